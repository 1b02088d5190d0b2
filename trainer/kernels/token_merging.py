"""Tokens of a grid that are alike, averaged and copied back: bipartite soft matching of ToMe for
stable diffusion (Bolya and Hoffman, arXiv 2303.17604, section 4).

One random token of every cell is a target, the same for all batch rows; each other one has the
target that it is most similar to by cosine. The most similar others are averaged into their
targets; after attention they get a copy of what their target got.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]

BLOCK = 128  # rows of similarities at once, whose maximum is taken while they are in the cache


@dataclass(frozen=True)
class Groups:
    """Which tokens are averaged into one. into (b, n): the number of each token's group; sizes
    (b, m): how many tokens a group has, in fp32; every group has at least one."""

    into: Tensor
    sizes: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """Means of groups, (b, n, c) to (b, m, c)."""
        flat = x.flatten(0, 1)
        summed = flat.new_zeros(self.sizes.numel(), x.shape[2]).index_add(0, self._places(), flat)
        return summed.view(*self.sizes.shape, -1) / self.sizes.to(x.dtype)[..., None]

    def unmerge(self, y: Tensor) -> Tensor:
        """To every token what its group got, (b, m, c) to (b, n, c)."""
        found = y.flatten(0, 1).index_select(0, self._places())
        return found.view(*self.into.shape, -1)

    def _places(self) -> Tensor:
        """Where the group of each token is among those of all rows, (b n)."""
        rows, count = self.sizes.shape
        first = torch.arange(rows, device=self.into.device) * count
        return (self.into + first[:, None]).flatten()


@dataclass(frozen=True)
class Matching:
    """Which tokens are alike. targets (t,), others (s,): positions; order (b, s): the others, the
    most similar to their targets first; choice (b, s): the number of each other's target."""

    targets: Tensor
    others: Tensor
    order: Tensor
    choice: Tensor

    def groups(self, ratio: float) -> Groups:
        """Of the others, the `ratio` * n that are most similar to their targets join these. The
        groups of the rest come first, in their order, then those of the targets."""
        rows, tokens = len(self.order), len(self.targets) + len(self.others)
        count = min(len(self.others), int(ratio * tokens))
        goes, stays = self.order[:, :count], self.order[:, count:]
        alone, kinds = stays.shape[1], len(self.targets)
        number = self.choice + alone
        number.scatter_(1, stays, torch.arange(alone, device=number.device).expand(rows, -1))
        into = number.new_empty(rows, tokens)
        into[:, self.others] = number
        into[:, self.targets] = torch.arange(kinds, device=number.device) + alone
        joined = self.choice.gather(1, goes)
        sizes = torch.ones(rows, alone + kinds, device=number.device)
        sizes.scatter_add_(1, joined + alone, torch.ones_like(joined, dtype=sizes.dtype))
        return Groups(into, sizes)


def match(x: Tensor, grid: Grid, *, cell: int, seed: int) -> Matching:
    """The matching of tokens x (b, n, c) by cosine, with cells of cell * cell and targets that are
    a function of `seed`."""
    targets, others = _parted(grid, cell, seed)
    targets, others = targets.to(x.device), others.to(x.device)
    direction = F.normalize(x.detach(), dim=-1)
    to, left = direction[:, targets].transpose(1, 2), direction[:, others]
    rows = BLOCK if x.device.type == "cpu" else len(others)
    found = [(part @ to).max(dim=-1) for part in left.split(max(1, rows), 1)]
    best, choice = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return Matching(targets, others, order=best.argsort(dim=-1, descending=True), choice=choice)


def num_merged(grid: Grid, cell: int, ratio: float) -> int:
    """The number of groups that `Matching.groups` makes."""
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


def joined_heads(x: Tensor) -> Tensor:
    """(b, h, n, d) to (b, n, h d)."""
    return x.transpose(1, 2).flatten(2)


def split_again(x: Tensor, heads: int) -> Tensor:
    """(b, n, h d) to (b, h, n, d)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)
