"""Tokens merged and given back by matrix products: ToMA (Lu et al., arXiv 2509.10918).

In every tile of the grid, the tokens d that stand for all others are chosen greedily, so that every
token has one like it among them (facility location):

    D = argmax sum_i max_(d in D) cos(x_i, x_d)

and with A_di = softmax_d(sharpness * cos(x_d, x_i)), the share of token i that goes to d,

    merged_d = sum_i A_di x_i / sum_i A_di        unmerged_i = sum_d A_di y_d
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels.token_merging import Grid


@dataclass(frozen=True)
class Tiling:
    """A grid of tokens in equal tiles. grid: height and width in tokens; tile: of one tile."""

    grid: Grid
    tile: Grid

    @classmethod
    def of(cls, grid: Grid, side: int) -> Tiling:
        """Tiles of at most side * side tokens: along each edge the largest number that divides
        it."""
        height, width = (
            max(n for n in range(1, min(side, length) + 1) if length % n == 0) for length in grid
        )
        return cls(grid, (height, width))

    @property
    def tokens(self) -> int:
        """Of one tile."""
        return self.tile[0] * self.tile[1]

    def split(self, x: Tensor) -> Tensor:
        """(b, n, c) to (b, tiles, tokens, c)."""
        rows, columns = self._counts
        parts = x.view(len(x), rows, self.tile[0], columns, self.tile[1], -1).transpose(2, 3)
        return parts.reshape(len(x), rows * columns, self.tokens, -1)

    def join(self, parts: Tensor) -> Tensor:
        """(b, tiles, tokens, c) to (b, n, c)."""
        rows, columns = self._counts
        whole = parts.view(len(parts), rows, columns, *self.tile, -1).transpose(2, 3)
        return whole.reshape(len(parts), self.grid[0] * self.grid[1], -1)

    @property
    def _counts(self) -> Grid:
        return self.grid[0] // self.tile[0], self.grid[1] // self.tile[1]


@dataclass(frozen=True)
class SoftGroups:
    """shares (b, tiles, m, tokens): A, whose columns sum to 1."""

    shares: Tensor
    tiling: Tiling

    @property
    def sizes(self) -> Tensor:
        """How many tokens each of those that are left stands for, (b, tiles * m)."""
        return self.shares.sum(-1).flatten(1)

    def merge(self, x: Tensor) -> Tensor:
        """(b, n, c) to (b, tiles * m, c)."""
        means = self.shares / self.shares.sum(-1, keepdim=True)
        return (means.to(x.dtype) @ self.tiling.split(x)).flatten(1, 2)

    def unmerge(self, y: Tensor) -> Tensor:
        """(b, tiles * m, c) to (b, n, c)."""
        own = y.unflatten(1, self.shares.shape[1:3])
        return self.tiling.join(self.shares.transpose(2, 3).to(y.dtype) @ own)


def chosen_tokens(x: Tensor, tiling: Tiling, count: int) -> Tensor:
    """The numbers (b, tiles, count) of the tokens of every tile that stand for the others, by
    greedy facility location on the cosines of x (b, n, c)."""
    direction = F.normalize(tiling.split(x.detach()).float(), dim=-1)
    alike = direction @ direction.transpose(2, 3)  # b tiles tokens tokens
    best = alike.new_full(alike.shape[:3], -1.0)
    chosen: list[Tensor] = []
    for _ in range(count):
        gain = (alike - best[:, :, None]).clamp_(min=0).sum(-1)
        if chosen:  # equal tokens gain nothing, and no token is chosen twice
            gain.scatter_(2, torch.stack(chosen, 2), -1.0)
        chosen.append(gain.argmax(-1))
        row = chosen[-1][..., None, None].expand(-1, -1, 1, alike.shape[3])
        best = torch.maximum(best, alike.gather(2, row)[:, :, 0])
    return torch.stack(chosen, 2)


def soft_groups(x: Tensor, tiling: Tiling, chosen: Tensor, *, sharpness: float) -> SoftGroups:
    """How tokens x (b, n, c) are shared out to those `chosen` of every tile."""
    direction = F.normalize(tiling.split(x.detach()).float(), dim=-1)
    index = chosen[..., None].expand(-1, -1, -1, direction.shape[3])
    scores = direction.gather(2, index) @ direction.transpose(2, 3)
    return SoftGroups((sharpness * scores).softmax(dim=2), tiling)
