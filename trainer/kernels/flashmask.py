"""Attention that skips hidden tiles, with masks given as intervals of rows for each column.

FlashMask (Wang et al., arXiv 2410.01359): column (key) j is hidden from the rows (queries)

    LTS_j <= i < LTE_j   or   UTS_j <= i < UTE_j                            (section 4.1)

so a mask is O(m) numbers, not n m. From the extrema of the four over a block of columns follows
which tiles are completely hidden and which are completely visible (section 4.2, equations 3 and 4).

Three back ends give the same result: `dense` (SDPA with the complete mask), `blockwise` (the tiled
kernel without the hidden tiles, forward and backward, on any device), `flex` (PyTorch's compiled
flex_attention, CUDA only, because it has no backward on a CPU).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trainer.kernels.mask_spec import MaskSpec
from trainer.kernels.softmax import sdpa
from trainer.kernels.tiled import COLUMNS, Sizes, Span, blocks, tiled_attention

ROWS, BLOCK = 128, 64  # queries of a tile; keys of a block, adjacent blocks of one kind make a tile
FEW = 512  # tokens up to which a CPU is faster with the complete mask


def dense(q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, scale: float | None = None) -> Tensor:
    """SDPA with the complete mask: O(n m) memory, and hidden scores are computed too."""
    return sdpa(q, k, v, mask=spec.dense().to(q.device), scale=scale)


def blockwise(
    q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, scale: float | None = None
) -> Tensor:
    """The tiled kernel without completely hidden tiles; a mask is applied only in partly hidden
    ones."""
    tiles = _Blocks(spec.to(q.device), q.shape[1])
    return tiled_attention(q, k, v, tiles=tiles, scale=scale, rows=ROWS, columns=COLUMNS)


def flex(q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, scale: float | None = None) -> Tensor:
    """Compiled flex_attention; ValueError away from CUDA."""
    if not q.is_cuda:
        raise ValueError("flex_attention has no backward on a CPU; use backend=blockwise there")
    found: Tensor = _compiled()(q, k, v, block_mask=spec.block_mask(q.device), scale=scale)
    return found


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


BACK_ENDS = {"dense": dense, "blockwise": blockwise, "flex": flex}


class _Blocks:
    """The tiles of a mask. Heads with the same mask are computed together."""

    def __init__(self, spec: MaskSpec, heads: int) -> None:
        self.spec, self.heads = spec, heads

    def visits(self, sizes: Sizes) -> Iterator[tuple[slice, slice, Iterable[Span]]]:
        plans = self.spec.plan(sizes.rows, min(BLOCK, sizes.columns))
        batches, heads = self.spec.lts.shape[:2]
        for shared, own in self._shared(sizes.heads, batches, heads):
            parts = [
                slice(shared.start + part.start, shared.start + part.stop)
                for part in blocks(shared.stop - shared.start, sizes.group)
            ]
            for rows, runs in zip(blocks(sizes.queries, sizes.rows), plans[own], strict=True):
                # made once for all heads: a row of tiles is O(m)
                spans = [self._span(own, rows, *run) for run in runs]
                for part in parts:
                    yield part, rows, spans

    def _shared(self, count: int, batches: int, heads: int) -> Iterator[tuple[slice, int]]:
        """Each group of heads with one mask, and the index of that mask."""
        if batches == heads == 1:
            yield slice(0, count), 0
        elif heads == 1:
            for row in range(batches):
                yield slice(row * self.heads, (row + 1) * self.heads), row
        else:
            for each in range(count):
                row = each // self.heads if batches > 1 else 0
                yield slice(each, each + 1), row * heads + each % self.heads

    def _span(self, own: int, rows: slice, start: int, stop: int, partly: bool) -> Span:
        columns = slice(start, stop)
        if not partly:
            return columns, None
        return columns, self.spec.hidden(rows, columns).flatten(0, 1)[own]

    def add_gradient(self, heads: slice, rows: slice, columns: slice, *, scores: Tensor) -> None:
        """Does nothing: a mask of intervals has no parameters."""


def both(mask: Tensor, allowed: Tensor) -> Tensor:
    """`mask` that also hides where `allowed` is False."""
    if mask.dtype == torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, float("-inf"))
