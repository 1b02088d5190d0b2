"""Exact softmax attention in tiles: O(n + m) memory forward and backward.

FlashAttention (Dao et al., arXiv 2205.14135, algorithm 1): per block of queries a running maximum m
and sum l over blocks of keys, here with the softmax P_t of each tile, its maximum m_t and sum l_t

    m' = max(m, m_t)
    l' = e^(m - m') l + e^(m_t - m') l_t
    O' = e^(m - m') O + e^(m_t - m') l_t P_t V

FlashAttention-2 (Dao, arXiv 2307.08691, section 3.1): queries outside, one division by l at the
end, and L = m + log l is all that is kept for the backward, which computes the tiles again:

    P = e^(S - L)   D = rowsum(dO * O)   dS = P * (dO V^T - D)
    dV = P^T dO     dQ = dS K            dK = dS^T Q

On CUDA `flash.py` has the fused kernel of the same; this one shows what it does, on any device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    pass


ROWS, COLUMNS = 512, 512
# scores in one tile: on a CPU what fits the second-level cache of a core, on CUDA what fills it
CPU_SCORES, CUDA_SCORES = 2**18, 2**25

Span = tuple[slice, Tensor | None]  # columns, and what hides some of them: broadcasts to g n m


@dataclass(frozen=True)
class Sizes:
    """What the loops run over: `heads` counts batch rows times heads."""

    heads: int
    queries: int
    keys: int
    group: int
    rows: int
    columns: int


class Tiles(Protocol):
    """Which tiles of the scores there are and what is masked in them."""

    def visits(self, sizes: Sizes) -> Iterator[tuple[slice, slice, Iterable[Span]]]:
        """Heads and queries, each pair of them once, with the keys those may see some of."""
        ...

    def add_gradient(self, heads: slice, rows: slice, columns: slice, scores: Tensor) -> None:
        """Takes the gradient of a tile's scores, where the mask is learned."""
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
    """The kernel: see the package for shapes and masks; a mask that is added may need a gradient.

    rows, columns: the largest tile of queries and keys.
    """
    return tiled_attention(q, k, v, Dense(mask, q.shape[1]), scale, rows, columns, mask)


@torch.compiler.disable
def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    scale: float | None = None,
    rows: int = ROWS,
    columns: int = COLUMNS,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention (b, h, n, d) over the tiles there are; `bias` is what `tiles` adds to scores."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads, queries, keys = q.shape[0] * q.shape[1], q.shape[2], k.shape[2]
    rows, columns = max(1, min(rows, queries)), max(1, min(columns, keys))
    scores = CUDA_SCORES if q.is_cuda else CPU_SCORES * torch.get_num_threads()
    group = min(heads, max(1, scores // (rows * columns)))
    sizes = Sizes(heads, queries, keys, group, rows, columns)
    found: Tensor = _Tiled.apply(q, k, v, bias, tiles, scale, sizes)
    return found


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        tiles: Tiles,
        scale: float,
        sizes: Sizes,
    ) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            q_, k_, v_ = _flat(q, k, v)
            o, total = _forward(q_, k_, v_, tiles, scale, sizes)
        o = o.view(*q.shape[:3], v.shape[-1]).to(v.dtype)
        ctx.save_for_backward(q, k, v, o, total, bias)
        ctx.tiles, ctx.scale, ctx.sizes = tiles, scale, sizes
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, total, bias = ctx.saved_tensors
        learned = Dense(bias, q.shape[1], learned=True) if ctx.needs_input_grad[3] else None
        with torch.autocast(q.device.type, enabled=False):
            q_, k_, v_, d_o_, o_ = _flat(q, k, v, d_o, o)
            tiles = learned or ctx.tiles
            found = _backward(q_, k_, v_, d_o_, o_, total, tiles, ctx.scale, ctx.sizes)
        own = [x.view(t.shape).to(t.dtype) for x, t in zip(found, (q, k, v), strict=True)]
        d_bias = None if learned is None else learned.gradient.view(bias.shape).to(bias.dtype)
        return (*own, d_bias, None, None, None)


def _flat(*tensors: Tensor) -> list[Tensor]:
    """(b h) n d, dense in memory, in at least float32."""
    kind = torch.float32
    for tensor in tensors:
        kind = torch.promote_types(kind, tensor.dtype)
    return [tensor.flatten(0, 1).to(kind).contiguous() for tensor in tensors]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    """Output (b h) n d and L (b h) n 1; L is +inf where a query sees nothing."""
    o = q.new_zeros(*q.shape[:2], v.shape[-1])
    total = q.new_full((*q.shape[:2], 1), float("inf"))
    scratch = _scratch(q, sizes)
    lowest = torch.finfo(q.dtype).min
    for heads, rows, spans in tiles.visits(sizes):
        out = o[heads, rows]
        top = out.new_full((*out.shape[:2], 1), float("-inf"))
        sums = torch.zeros_like(top)
        for columns, hidden in spans:
            s = _tile(scratch, heads, rows, columns)
            torch.baddbmm(s, q[heads, rows], k[heads, columns].mT, beta=0, alpha=scale, out=s)
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
    """Masks a tile in place; its row maxima, -inf where all is hidden: softmax cannot take that."""
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
    d_o: Tensor,
    o: Tensor,
    total: Tensor,
    tiles: Tiles,
    scale: float,
    sizes: Sizes,
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    scratch, other = _scratch(q, sizes), _scratch(q, sizes)
    minus_total = total.neg()
    minus_delta = (d_o * o).sum(-1, keepdim=True).neg_()
    for heads, rows, spans in tiles.visits(sizes):
        query, out = q[heads, rows], d_o[heads, rows]
        for columns, hidden in spans:
            key = k[heads, columns]
            p = _tile(scratch, heads, rows, columns)
            torch.baddbmm(minus_total[heads, rows], query, key.mT, alpha=scale, out=p)
            if hidden is not None:
                _hide(p, hidden)
            p.exp_()
            d_v[heads, columns].baddbmm_(p.mT, out)
            d_s = _tile(other, heads, rows, columns)
            torch.baddbmm(minus_delta[heads, rows], out, v[heads, columns].mT, out=d_s)
            d_s.mul_(p)
            tiles.add_gradient(heads, rows, columns, d_s)
            d_q[heads, rows].baddbmm_(d_s, key, alpha=scale)
            d_k[heads, columns].baddbmm_(d_s.mT, query, alpha=scale)
    return d_q, d_k, d_v


def _scratch(q: Tensor, sizes: Sizes) -> Tensor:
    return q.new_empty(sizes.group * sizes.rows * sizes.columns)


def _tile(scratch: Tensor, *sides: slice) -> Tensor:
    """A dense tensor for one tile, in memory that the next tile takes over."""
    shape = [side.stop - side.start for side in sides]
    return scratch[: shape[0] * shape[1] * shape[2]].view(shape)


def blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class Dense:
    """All tiles, under a mask that broadcasts to (b, h, n, m), or none.

    learned: keep the gradient of an added mask, in `gradient`.
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

    def add_gradient(self, heads: slice, rows: slice, columns: slice, scores: Tensor) -> None:
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
        """Where a group's heads stand in the mask: in its batch rows and heads, if it has them."""
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
