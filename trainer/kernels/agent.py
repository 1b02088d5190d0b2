"""Agent attention: queries ask a few agents, which have asked the keys, O(n) in the tokens.

    o = softmax(q a^T s2 + B2) softmax(a k^T s1 + B1) v

Han et al., arXiv 2312.08874, equation 4 with the biases of section 3.3; AgentSD is the same without
training. q, k, v and o are (b, h, n, d), agents a (b, h, m, d), B1 (h, m, n), B2 (h, n, m).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels.softmax import HALF, sdpa

Grid = tuple[int, int]

SCORES = 2**20  # of a head at once
BLOCK, LINE = 7, 32  # cells of the two parts of a bias, stretched over the grid


def agent_attention(
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    query_scale: float | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """o (b, h, n, d); scale: s1, d ** -0.5 unless given, query_scale: s2, s1 unless given, bias: B1
    and B2."""
    to_agents, to_queries = (None, None) if bias is None else (x.to(q.dtype) for x in bias)
    query_scale = scale if query_scale is None else query_scale
    step = in_blocks if _wants_products(q) else sdpa
    return step(q, agents, step(agents, k, v, to_agents, scale), to_queries, query_scale)


def _wants_products(q: Tensor) -> bool:
    """In half precision on a CPU PyTorch's kernel is no faster than in float32, where products are
    several times. What a backward would keep of their scores grows with n * m, so not there."""
    return q.device.type == "cpu" and q.dtype in HALF and not torch.is_grad_enabled()


def in_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q k^T * scale + mask) v by plain products, so many queries at once that a head's
    scores stay small. mask (..., n, m) is added."""
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    k, rows = k.transpose(-2, -1), max(1, SCORES // k.shape[-2])
    blocks = []
    for start in range(0, q.shape[-2], rows):
        scores = q[..., start : start + rows, :] @ k
        if mask is not None:
            scores = scores + mask[..., start : start + rows, :]
        blocks.append(scores.softmax(-1) @ v)
    return torch.cat(blocks, dim=-2)


def pooled(q: Tensor, grid: Grid, side: int) -> Tensor:
    """Agents (b, h, side * side, d): means of the queries over side * side parts of the grid."""
    batch, heads, _, width = q.shape
    image = q.transpose(2, 3).reshape(batch, -1, *grid)  # b (h d) y x
    cells = F.adaptive_avg_pool2d(image, side)
    return cells.view(batch, heads, width, -1).transpose(2, 3)


class AgentBias(nn.Module):
    """A bias of every agent for every place of the grid, for one of the two steps: a coarse map and
    one line down and one across, stretched over whatever grid there is. Zero at the start."""

    def __init__(self, heads: int, agents: int) -> None:
        super().__init__()
        self.block = nn.Parameter(torch.zeros(heads, agents, BLOCK, BLOCK))
        self.down = nn.Parameter(torch.zeros(heads, agents, LINE))
        self.across = nn.Parameter(torch.zeros(heads, agents, LINE))

    def forward(self, grid: Grid) -> Tensor:
        """(heads, agents, n)"""
        block = F.interpolate(self.block, size=grid, mode="bilinear")
        down = F.interpolate(self.down, size=grid[0], mode="linear")
        across = F.interpolate(self.across, size=grid[1], mode="linear")
        return (block + down[..., None] + across[..., None, :]).flatten(2)


class Shortcut(nn.Module):
    """A depthwise convolution over the values on their grid, beside an attention of low rank that
    loses what is local. Zero at the start."""

    def __init__(self, channels: int, size: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, size, size))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, v: Tensor, grid: Grid) -> Tensor:
        """v and the result (b, h, n, d)."""
        batch, heads, _, width = v.shape
        image = v.transpose(2, 3).reshape(batch, -1, *grid)
        padding = self.weight.shape[-1] // 2
        image = F.conv2d(image, self.weight, self.bias, padding=padding, groups=image.shape[1])
        return image.view(batch, heads, width, -1).transpose(2, 3).to(v.dtype)


def merged(q: Tensor, x: Tensor, grid: Grid, cell: int, ratio: float, seed: int) -> Tensor:
    """Agents (b, h, m, d) of AgentSD: the queries after token merging (ToMe for diffusion, arXiv
    2303.17604) of the inputs x (b, n, c).

    One random token of every cell * cell stays; of the others the `ratio` * n most like one that
    stays are averaged into it. Those that are left become agents as well. Averaging queries is
    projecting averaged inputs. The cells are the same for all rows and a function of `seed`.
    """
    targets, others = _parted(grid, cell, seed)
    targets, others = targets.to(x.device), others.to(x.device)
    direction = F.normalize(x.detach(), dim=-1)
    likeness = direction[:, others] @ direction[:, targets].transpose(1, 2)  # b others targets
    best, choice = likeness.max(dim=-1)
    count = min(len(others), int(ratio * x.shape[1]))
    order = best.argsort(dim=-1, descending=True)
    goes, stays = order[:, :count], order[:, count:]
    batch, heads, _, width = q.shape
    flat = q.transpose(1, 2).flatten(2)  # b n (h d)

    def rows(source: Tensor, index: Tensor) -> Tensor:
        return source.gather(1, index[..., None].expand(-1, -1, source.shape[-1]))

    from_others = flat[:, others]
    into = choice.gather(1, goes)[..., None].expand(-1, -1, flat.shape[-1])
    kept = flat[:, targets].scatter_reduce(1, into, rows(from_others, goes), "mean")
    agents = torch.cat([rows(from_others, stays), kept], dim=1)
    return agents.view(batch, -1, heads, width).transpose(1, 2)


def num_merged(grid: Grid, cell: int, ratio: float) -> int:
    """How many agents `merged` will make."""
    tokens = grid[0] * grid[1]
    others = tokens - max(1, grid[0] // cell) * max(1, grid[1] // cell)
    return tokens - min(others, int(ratio * tokens))


def _parted(grid: Grid, cell: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of a random token of each whole cell, and of all others. A grid smaller than a cell
    is one cell."""
    height, width = (min(cell, length) for length in grid)
    rows, columns = grid[0] // height, grid[1] // width
    generator = torch.Generator().manual_seed(seed)
    inside = torch.randint(height * width, (rows, columns), generator=generator)
    y = torch.arange(rows)[:, None] * height + inside // width
    x = torch.arange(columns) * width + inside % width
    targets = (y * grid[1] + x).flatten()
    is_target = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    is_target[targets] = True
    return targets, (~is_target).nonzero().flatten()
