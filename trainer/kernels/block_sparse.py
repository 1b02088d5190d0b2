"""Softmax attention of blocks of queries to chosen blocks of keys; the other blocks are never
touched.

The chosen keys of each block of queries are gathered and attended to by PyTorch's fused kernel, so
that time is in proportion to what is chosen. On a CPU the backward gathers again in place of
keeping what it gathered, and needs no second forward: it starts from the log-sum-exp of the
forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.kernels.softmax import sdpa

GATHERED = 2**22  # numbers of gathered keys at once, on a CPU
FUSED: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FUSED_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class ChosenBlocks:
    """index (g, nq, c): the numbers of the blocks of keys that each block of queries attends to,
    the same for all heads (g = 1) or of each (g = b h); size: tokens of a block, the last one may
    be shorter. visible (nq, size, c, size), True where a query may attend to a key; None where it
    may to all."""

    index: Tensor
    size: int
    visible: Tensor | None = None


def block_sparse(
    q: Tensor, k: Tensor, v: Tensor, chosen: ChosenBlocks, scale: float | None = None
) -> Tensor:
    """o (b, h, n, d) of q, k and v (b, h, n, d); every query must be allowed to some key."""
    tokens = q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    blocked = [_blocked(x, chosen.size) for x in (q, k, v)]
    if q.is_cuda or q.dtype not in (torch.float32, torch.float64):
        parts = []
        for part, index, mask in _parts(chosen, blocked[0], tokens):
            keys, values = _gathered(blocked[1:], index)
            parts.append(sdpa(blocked[0][:, part], keys, values, mask=mask, scale=scale))
        o = torch.cat(parts, dim=1)
    else:
        o = _Gathered.apply(*blocked, (chosen, scale, tokens))
    return o.flatten(1, 2)[:, :tokens].unflatten(0, q.shape[:2])


class _Gathered(torch.autograd.Function):
    """By the fused kernel of a CPU; q, k, v and o (g, nq, size, d), g = b h."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, work: Any) -> Tensor:
        chosen, scale, tokens = work
        o, sums = torch.empty_like(q), []
        for part, index, mask in _parts(chosen, q, tokens):
            keys, values = _gathered([k, v], index)
            found, total = FUSED(q[:, part], keys, values, attn_mask=mask, scale=scale)
            o[:, part] = found
            sums.append(total)
        ctx.save_for_backward(q, k, v, o, *sums)
        ctx.work = work
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, *sums = ctx.saved_tensors
        chosen, scale, tokens = ctx.work
        d_q, d_k, d_v = torch.empty_like(q), k.new_zeros(k.shape), v.new_zeros(v.shape)
        for total, (part, index, mask) in zip(sums, _parts(chosen, q, tokens), strict=True):
            keys, values = _gathered([k, v], index)
            own = FUSED_BACKWARD(
                grad_out=d_o[:, part].contiguous(),
                query=q[:, part],
                key=keys,
                value=values,
                out=o[:, part],
                logsumexp=total,
                dropout_p=0.0,
                is_causal=False,
                attn_mask=mask,
                scale=scale,
            )
            d_q[:, part] = own[0]
            for into, found in ((d_k, own[1]), (d_v, own[2])):
                _scattered(into, found, index)
        return d_q, d_k, d_v, None


def _parts(
    chosen: ChosenBlocks, q: Tensor, tokens: int
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Blocks of queries that are computed at once, their rows of the index, and their mask (g or 1,
    blocks, size, c * size) as it is added; q (g, nq, size, d)."""
    count, each = q.shape[1], chosen.index.shape[2] * chosen.size
    at_once = count if q.is_cuda else max(1, GATHERED // (len(q) * each * q.shape[3]))
    for start in range(0, count, at_once):
        part = slice(start, min(start + at_once, count))
        index = chosen.index[:, part]
        yield part, index, _mask(chosen, part, index, tokens=tokens, like=q)


def _mask(
    chosen: ChosenBlocks, part: slice, index: Tensor, *, tokens: int, like: Tensor
) -> Tensor | None:
    hidden = None
    if tokens % chosen.size:  # the last block has tokens that are none
        places = index[..., None] * chosen.size + torch.arange(chosen.size, device=index.device)
        hidden = (places >= tokens).flatten(2)[:, :, None]
    if chosen.visible is not None:
        own = ~chosen.visible[part].flatten(2)[None]
        hidden = own if hidden is None else hidden | own
    if hidden is None:
        return None
    shape = (len(index), index.shape[1], chosen.size, hidden.shape[3])
    zeros = torch.zeros(shape, dtype=like.dtype, device=like.device)
    return zeros.masked_fill_(hidden, float("-inf"))


def _blocked(x: Tensor, size: int) -> Tensor:
    """(b, h, n, d) to (b h, blocks, size, d), with zeros after the last token."""
    flat = x.flatten(0, 1)
    if left := -flat.shape[1] % size:
        flat = F.pad(flat, (0, 0, 0, left))
    return flat.unflatten(1, (-1, size))


def _gathered(blocks: list[Tensor], index: Tensor) -> list[Tensor]:
    """The chosen blocks of tensors (g, nk, size, d), joined: (g, nq, c * size, d)."""
    heads = torch.arange(len(blocks[0]), device=index.device)[:, None, None]
    return [x[heads, index].flatten(2, 3) for x in blocks]


def _scattered(into: Tensor, found: Tensor, index: Tensor) -> None:
    """Adds gradients of gathered blocks (g, nq, c * size, d) to those of the blocks."""
    count, width = into.shape[1], into.shape[2] * into.shape[3]
    first = torch.arange(len(into), device=index.device)[:, None, None] * count
    places = (index + first).flatten()
    into.view(-1, width).index_add_(0, places, found.reshape(len(places), width))
