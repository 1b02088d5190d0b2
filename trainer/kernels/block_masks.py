"""Which tokens of a picture or clip attend to which, by whole blocks: sliding tiles, radial
attention, circular windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels.block_sparse import ChosenBlocks
from trainer.kernels.token_merging import Grid


@dataclass(frozen=True)
class BlockMask:
    """order (n,): the token at each place, so that the tokens of a block are adjacent; None for the
    tokens' own order. shown: the share of pairs of tokens that attend to each other."""

    chosen: ChosenBlocks
    order: Tensor | None
    shown: float

    def to(self, device: torch.device) -> BlockMask:
        own = self.chosen
        visible = None if own.visible is None else own.visible.to(device)
        order = None if self.order is None else self.order.to(device)
        return BlockMask(ChosenBlocks(own.index.to(device), own.size, visible), order, self.shown)


def sliding_tiles(grid: Grid, tile: Grid, reach: int) -> BlockMask:
    """Every tile of the grid attends to (2 reach + 1)^2 tiles around it, moved inwards at the
    borders so that all attend to as many (Sliding Tile Attention, Zhang et al., arXiv 2502.04507;
    NATTEN's windows, of tiles). tile: its height and width, which divide those of the grid."""
    counts = [length // edge for length, edge in zip(grid, tile, strict=True)]
    lines = [_window(count, reach) for count in counts]  # each (tiles, seen)
    rows, columns = lines[0][:, None, :, None], lines[1][None, :, None, :]
    index = (rows * counts[1] + columns).flatten(2).flatten(0, 1)
    shown = index.shape[1] / (counts[0] * counts[1])
    return BlockMask(ChosenBlocks(index[None], tile[0] * tile[1]), _order(grid, tile), shown)


def circle(grid: Grid, tile: Grid, radius: float) -> BlockMask:
    """A token attends to those whose distance on the grid is at most `radius` (CLEAR, Liu et al.,
    arXiv 2412.16112, section 3.2). Tiles that no token of a tile reaches are not computed."""
    order = _order(grid, tile)
    y, x = (part.double() for part in (order // grid[1], order % grid[1]))

    def sees(i: Tensor) -> Tensor:
        return (y[i, None] - y) ** 2 + (x[i, None] - x) ** 2 <= radius**2

    return _of_rows(len(order), tile[0] * tile[1], sees=sees, order=order)


def radial(frames: int, tokens: int, width: float, size: int) -> BlockMask:
    """Radial attention (Li et al., arXiv 2506.19852, section 4.2), frames one after another, of so
    many tokens each. With p = floor(log2 max(|a - b|, 1)), places k and l in frames a and b attend
    to each other where |k - l| + 1 <= width / 2^p; where that is below one token, the same place
    does in frames whose distance ceil(2^p / width) divides. All attend to the first frame."""
    place = torch.arange(frames * tokens)
    frame, inside = place // tokens, place % tokens

    def sees(i: Tensor) -> Tensor:
        apart = (frame[i, None] - frame).abs()
        reach = width / 2 ** apart.clamp(min=1).double().log2().floor()
        near = (inside[i, None] - inside).abs() + 1 <= reach
        same = (inside[i, None] == inside) & (apart % (1 / reach).ceil() == 0)
        return near | same & (reach < 1) | (frame == 0)

    return _of_rows(len(place), size, sees=sees, order=None)


def _of_rows(
    tokens: int, size: int, *, sees: Callable[[Tensor], Tensor], order: Tensor | None
) -> BlockMask:
    """From which places attend to which, for places (i,) a table (i, n). Every block of queries
    gathers as many blocks of keys; where it needs fewer, the others are hidden."""
    count = -(-tokens // size)
    parts = [torch.arange(tokens)[start : start + size] for start in range(0, tokens, size)]
    tables = [F.pad(sees(part), (0, count * size - tokens)) for part in parts]
    tables[-1] = F.pad(tables[-1], (0, 0, 0, size - len(parts[-1])))
    tables[-1][len(parts[-1]) :, 0] = True  # of no use, but a row without a key has no softmax
    cut = [table.view(size, count, size) for table in tables]
    touched = torch.stack([table.any(2).any(0) for table in cut])
    index = touched.int().argsort(dim=1, descending=True, stable=True)
    index = index[:, : int(touched.sum(1).max())]
    visible = torch.stack([table[:, own] for table, own in zip(cut, index, strict=True)])
    share = float(sum(table[: len(part)].sum() for table, part in zip(tables, parts, strict=True)))
    chosen = ChosenBlocks(index[None], size, None if bool(visible.all()) else visible)
    return BlockMask(chosen, order, share / tokens**2)


def _window(count: int, reach: int) -> Tensor:
    """For each of `count` places, those in a window around it that stays inside, (count, seen)."""
    width = min(2 * reach + 1, count)
    start = (torch.arange(count) - reach).clamp(0, count - width)
    return start[:, None] + torch.arange(width)


def _order(grid: Grid, tile: Grid) -> Tensor:
    """Tokens tile after tile."""
    place = torch.arange(grid[0] * grid[1]).view(
        grid[0] // tile[0], tile[0], grid[1] // tile[1], tile[1]
    )
    return place.transpose(1, 2).flatten()
