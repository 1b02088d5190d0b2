"""Exact softmax attention in tiles: O(n + m) memory forward and backward.

FlashAttention (Dao et al., arXiv 2205.14135, algorithm 1): each block of queries has a running
maximum m and sum l over blocks of keys; P_t, m_t and l_t are the softmax, maximum and sum of a tile

    m' = max(m, m_t)
    l' = e^(m - m') l + e^(m_t - m') l_t
    O' = e^(m - m') O + e^(m_t - m') l_t P_t V

FlashAttention-2 (Dao, arXiv 2307.08691, section 3.1): the outer loop is over queries, the division
by l comes last, and only L = m + log l is kept for the backward, which computes the tiles again:

    P = e^(S - L)   D = rowsum(dO * O)   dS = P * (dO V^T - D)
    dV = P^T dO     dQ = dS K            dK = dS^T Q

`flash.py` has the fused kernel for CUDA; this one shows the algorithm, and runs on any device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS, COLUMNS = 512, 512
# scores of one tile: on a CPU they fit the second-level cache of a core, on CUDA they fill the GPU
CPU_SCORES, CUDA_SCORES = 2**18, 2**25

Span = tuple[slice, Tensor | None]  # columns of a tile, and its mask or None; broadcasts to g n m


@dataclass(frozen=True)
class Sizes:
    """Lengths of the loops: heads (batch rows times heads), queries and keys in all; heads (group),
    queries (rows) and keys (columns) of one tile."""

    heads: int
    queries: int
    keys: int
    group: int
    rows: int
    columns: int


class Tiles(Protocol):
    """Which tiles of the scores are computed, and their masks."""

    def visits(self, sizes: Sizes) -> Iterator[tuple[slice, slice, Iterable[Span]]]:
        """Each block of heads and queries once, with the tiles of keys to compute for it."""
        ...

    def add_gradient(self, heads: slice, rows: slice, columns: slice, *, scores: Tensor) -> None:
        """Adds the gradient of a tile's scores to that of a mask which is learned."""
        ...


def tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    rows: int = ROWS,
    columns: int = COLUMNS,
) -> Tensor:
    """Attention with shapes and masks as in `softmax.py`; an added mask may need a gradient.

    rows, columns: the largest number of queries and keys in a tile.
    """
    tiles = Dense(mask, q.shape[1])
    return tiled_attention(q, k, v, tiles=tiles, scale=scale, rows=rows, columns=columns, bias=mask)


@torch.compiler.disable
def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tiles: Tiles,
    scale: float | None = None,
    rows: int = ROWS,
    columns: int = COLUMNS,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention (b, h, n, d) over `tiles`; bias: the tensor that `tiles` adds to scores, if any."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads, queries, keys = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    rows, columns = max(1, min(rows, queries)), max(1, min(columns, keys))
    scores = CUDA_SCORES if q.is_cuda else CPU_SCORES * torch.get_num_threads()
    group = min(heads, max(1, scores // (rows * columns)))
    sizes = Sizes(heads=heads, queries=queries, keys=keys, group=group, rows=rows, columns=columns)
    tensors = (q, k, v, bias)
    found: Tensor = _Tiled.apply(*tensors, Work(tiles, scale, sizes))
    return found


@dataclass(frozen=True)
class Work:
    """What forward and backward need beside tensors."""

    tiles: Tiles
    scale: float
    sizes: Sizes


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        work: Work,
    ) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            q_, k_, v_ = _flat([q, k, v])
            o, total = _forward(q_, k_, v_, work=work)
        o = o.view(*q.shape[:3], v.shape[-1]).to(v.dtype)
        saved = (q, k, v, o, total, bias)
        ctx.save_for_backward(*saved)
        ctx.work = work
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, total, bias = ctx.saved_tensors
        learned = Dense(bias, q.shape[1], learned=True) if ctx.needs_input_grad[3] else None
        with torch.autocast(q.device.type, enabled=False):
            q_, k_, v_, d_o_, o_ = _flat([q, k, v, d_o, o])
            work = replace(ctx.work, tiles=learned) if learned else ctx.work
            found = _backward(q_, k_, v_, d_o=d_o_, o=o_, total=total, work=work)
        own = [x.view(t.shape).to(t.dtype) for x, t in zip(found, (q, k, v), strict=True)]
        d_bias = None if learned is None else learned.gradient.view(bias.shape).to(bias.dtype)
        return (*own, d_bias, None)


def _flat(tensors: list[Tensor]) -> list[Tensor]:
    """(b h) n d, contiguous, in at least float32."""
    kind = torch.float32
    for tensor in tensors:
        kind = torch.promote_types(kind, tensor.dtype)
    return [tensor.flatten(0, 1).to(kind).contiguous() for tensor in tensors]


def _forward(q: Tensor, k: Tensor, v: Tensor, *, work: Work) -> tuple[Tensor, Tensor]:
    """Output (b h) n d and L (b h) n 1; L is +inf where a query attends to no key."""
    o = q.new_zeros(*q.shape[:2], v.shape[-1])
    total = q.new_full((*q.shape[:2], 1), float("inf"))
    scratch = _scratch(q, work.sizes)
    lowest = torch.finfo(q.dtype).min
    for heads, rows, spans in work.tiles.visits(work.sizes):
        out = o[heads, rows]
        top = out.new_full((*out.shape[:2], 1), float("-inf"))
        sums = torch.zeros_like(top)
        for columns, hidden in spans:
            s = _tile(scratch, (heads, rows, columns))
            torch.baddbmm(s, q[heads, rows], k[heads, columns].mT, beta=0, alpha=work.scale, out=s)
            peak = _peak(s, hidden)
            torch.softmax(s, -1, out=s)
            new = torch.maximum(top, peak)
            base = new.clamp(min=lowest)  # -inf - -inf is NaN
            keep = (top - base).exp_()
            # a tile's largest probability is e^0 / l_t
            gain = (peak - base).exp_().div_(s.amax(-1, keepdim=True))
            out.mul_(keep).addcmul_(torch.bmm(s, v[heads, columns]), gain)
            sums.mul_(keep).add_(gain)
            top = new
        seen = sums > 0
        out.div_(sums.masked_fill_(~seen, 1.0))
        total[heads, rows] = sums.log_().add_(top).masked_fill_(~seen, float("inf"))
    return o, total


def _peak(s: Tensor, hidden: Tensor | None) -> Tensor:
    """Masks a tile in place and returns its row maxima. Rows that are completely hidden have the
    maximum -inf and get scores of 0, because the softmax of -inf alone is NaN."""
    if hidden is None:
        return s.amax(-1, keepdim=True)
    _hide(s, hidden)
    peak = s.amax(-1, keepdim=True)
    s.masked_fill_(torch.isneginf(peak), 0.0)
    return peak


def _hide(s: Tensor, hidden: Tensor) -> None:
    if hidden.dtype == torch.bool:
        s.masked_fill_(hidden, float("-inf"))
    else:
        s.add_(hidden)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    d_o: Tensor,
    o: Tensor,
    total: Tensor,
    work: Work,
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    scratch, other = _scratch(q, work.sizes), _scratch(q, work.sizes)
    minus_total = total.neg()
    minus_delta = (d_o * o).sum(-1, keepdim=True).neg_()
    for heads, rows, spans in work.tiles.visits(work.sizes):
        query, out = q[heads, rows], d_o[heads, rows]
        for columns, hidden in spans:
            key = k[heads, columns]
            p = _tile(scratch, (heads, rows, columns))
            torch.baddbmm(minus_total[heads, rows], query, key.mT, alpha=work.scale, out=p)
            if hidden is not None:
                _hide(p, hidden)
            p.exp_()
            d_v[heads, columns].baddbmm_(p.mT, out)
            d_s = _tile(other, (heads, rows, columns))
            torch.baddbmm(minus_delta[heads, rows], out, v[heads, columns].mT, out=d_s)
            d_s.mul_(p)
            work.tiles.add_gradient(heads, rows, columns, scores=d_s)
            d_q[heads, rows].baddbmm_(d_s, key, alpha=work.scale)
            d_k[heads, columns].baddbmm_(d_s.mT, query, alpha=work.scale)
    return d_q, d_k, d_v


def _scratch(q: Tensor, sizes: Sizes) -> Tensor:
    return q.new_empty(sizes.group * sizes.rows * sizes.columns)


def _tile(scratch: Tensor, sides: tuple[slice, slice, slice]) -> Tensor:
    """A contiguous tensor for one tile, in memory that the next tile uses again."""
    shape = [side.stop - side.start for side in sides]
    return scratch[: shape[0] * shape[1] * shape[2]].view(shape)


def blocks(count: int, size: int) -> list[slice]:
    """0..count-1 in slices of `size`; the last may be shorter."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class Dense:
    """All tiles, with a mask that broadcasts to (b, h, n, m), or without a mask.

    learned: collect the gradient of an added mask in `gradient`.
    """

    def __init__(self, mask: Tensor | None, heads: int, learned: bool = False) -> None:
        if mask is not None:
            mask = mask[(None,) * (4 - mask.ndim)]
        self.mask, self.heads, self.learned = mask, heads, learned
        if learned:
            assert mask is not None
            self.gradient = torch.zeros_like(mask, dtype=_at_least_float32(mask))

    def visits(self, sizes: Sizes) -> Iterator[tuple[slice, slice, Iterable[Span]]]:
        groups, columns = blocks(sizes.heads, sizes.group), blocks(sizes.keys, sizes.columns)
        for heads, rows in product(groups, blocks(sizes.queries, sizes.rows)):
            yield heads, rows, ((part, self._cut(heads, rows, part)) for part in columns)

    def _cut(self, heads: slice, rows: slice, columns: slice) -> Tensor | None:
        if self.mask is None:
            return None
        cut = _part(self.mask, rows, columns)[self._index(heads)]
        return ~cut if cut.dtype == torch.bool else cut.to(_at_least_float32(cut))

    def add_gradient(self, heads: slice, rows: slice, columns: slice, *, scores: Tensor) -> None:
        if not self.learned:
            return
        into = _part(self.gradient, rows, columns)
        kept = [side + 1 for side in (0, 1) if into.shape[2 + side] == 1]
        summed = scores.sum(kept, keepdim=True) if kept else scores
        if into.shape[:2] == (1, 1):
            into[0] += summed.sum(0, keepdim=True)
        else:
            index = [i.expand(len(summed)) for i in self._index(heads)]
            into.index_put_((index[0], index[1]), summed, accumulate=True)

    def _index(self, heads: slice) -> tuple[Tensor, Tensor]:
        """Batch rows and heads of the mask for a group of heads; 0 where the mask has only one."""
        assert self.mask is not None
        if self.mask.shape[:2] == (1, 1):
            zero = torch.zeros(1, dtype=torch.long, device=self.mask.device)
            return zero, zero
        count = torch.arange(heads.start, heads.stop, device=self.mask.device)
        batch, head = count // self.heads, count % self.heads
        return batch * (self.mask.shape[0] > 1), head * (self.mask.shape[1] > 1)


def _part(mask: Tensor, rows: slice, columns: slice) -> Tensor:
    everything = slice(None)
    return mask[
        :,
        :,
        rows if mask.shape[2] > 1 else everything,
        columns if mask.shape[3] > 1 else everything,
    ]


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
