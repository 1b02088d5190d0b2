"""Agent attention: a few agents attend to the keys, and queries attend to the agents, O(n) in the
tokens.

    o = softmax(q a^T s2 + B2) softmax(a k^T s1 + B1) v

Han et al., arXiv 2312.08874, equation 4 with the biases of section 3.3; AgentSD is the same without
training. q, k, v and o are (b, h, n, d), agents a (b, h, m, d), B1 (h, m, n), B2 (h, n, m).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels.softmax import HALF, sdpa

Grid = tuple[int, int]

SCORES = 2**20  # scores of a head that are computed at once


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
    found = step(agents, k, v, mask=to_agents, scale=scale)
    return step(q, agents, found, mask=to_queries, scale=query_scale)


def _wants_products(q: Tensor) -> bool:
    """Whether plain products are faster than PyTorch's kernel: in half precision on a CPU, without
    gradients. A backward would need all scores, which are n * m."""
    return q.device.type == "cpu" and q.dtype in HALF and not torch.is_grad_enabled()


def in_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q k^T * scale + mask) v by plain products, with at most `SCORES` scores of a head at
    once. mask (..., n, m) is added."""
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
    return cells.unflatten(1, (heads, width)).flatten(3).transpose(2, 3)


@dataclass(frozen=True)
class Matching:
    """Which tokens of a grid are alike, for ToMe for diffusion (arXiv 2303.17604): one random token
    of every cell is a target, the same for all batch rows, and each other one has the target that
    it is most similar to.

    targets (t,), others (s,): positions; order (b, s): the others by similarity, the most similar
    first; choice (b, s): the number of each other's target.
    """

    targets: Tensor
    others: Tensor
    order: Tensor
    choice: Tensor

    def merge(self, tokens: Tensor, ratio: float) -> Tensor:
        """tokens (b, h, n, d) to (b, h, m, d): of the others, the `ratio` * n that are most similar
        to their targets are averaged into them. The rest come first, then the targets."""
        heads, width = tokens.shape[1], tokens.shape[3]
        flat = tokens.transpose(1, 2).flatten(2)  # b n (h d)
        goes, stays = self._parted(flat.shape[1], ratio)
        others = flat[:, self.others]
        into = self.choice.gather(1, goes)[..., None].expand(-1, -1, flat.shape[-1])
        kept = flat[:, self.targets].scatter_reduce(1, into, _rows(others, goes), reduce="mean")
        found = torch.cat([_rows(others, stays), kept], dim=1)
        return found.unflatten(2, (heads, width)).transpose(1, 2)

    def unmerge(self, merged: Tensor, ratio: float) -> Tensor:
        """The inverse, (b, h, m, d) to (b, h, n, d): a token that was averaged into its target gets
        a copy of that."""
        heads, width = merged.shape[1], merged.shape[3]
        flat = merged.transpose(1, 2).flatten(2)
        count = len(self.targets) + len(self.others)
        goes, stays = self._parted(count, ratio)
        rest, kept = flat[:, : stays.shape[1]], flat[:, stays.shape[1] :]
        copies = _rows(kept, self.choice.gather(1, goes))
        places = [self.others[stays], self.others[goes], self.targets.expand(len(flat), -1)]
        where = torch.cat(places, dim=1)[..., None].expand(-1, -1, flat.shape[-1])
        found = flat.new_empty(len(flat), count, flat.shape[-1])
        found = found.scatter(1, where, torch.cat([rest, copies, kept], dim=1))
        return found.unflatten(2, (heads, width)).transpose(1, 2)

    def _parted(self, tokens: int, ratio: float) -> tuple[Tensor, Tensor]:
        """The numbers of the others that are averaged, and of those that stay."""
        count = min(len(self.others), int(ratio * tokens))
        return self.order[:, :count], self.order[:, count:]


def match(x: Tensor, grid: Grid, *, cell: int, seed: int) -> Matching:
    """The matching of tokens x (b, n, c) by cosine, with cells of cell * cell and targets that are
    a function of `seed`."""
    targets, others = _parted(grid, cell, seed)
    targets, others = targets.to(x.device), others.to(x.device)
    direction = F.normalize(x.detach(), dim=-1)
    similarity = direction[:, others] @ direction[:, targets].transpose(1, 2)  # b others targets
    best, choice = similarity.max(dim=-1)
    return Matching(targets, others, order=best.argsort(dim=-1, descending=True), choice=choice)


def _rows(source: Tensor, index: Tensor) -> Tensor:
    """source (b, n, c) at index (b, m): (b, m, c)."""
    return source.gather(1, index[..., None].expand(-1, -1, source.shape[-1]))


def num_merged(grid: Grid, cell: int, ratio: float) -> int:
    """The number of tokens that `Matching.merge` leaves."""
    tokens = grid[0] * grid[1]
    others = tokens - max(1, grid[0] // cell) * max(1, grid[1] // cell)
    return tokens - min(others, int(ratio * tokens))


def _parted(grid: Grid, cell: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of one random token of each complete cell, and of all others. A grid smaller than a
    cell is one cell."""
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
