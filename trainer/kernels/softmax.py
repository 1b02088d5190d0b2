"""Attention kernels: pure functions from queries, keys and values to outputs.

    o = softmax(q k^T * scale + mask) v                        scale = head_dim ** -0.5 unless given

`q` is (batch, heads, queries, head_dim), `k` and `v` are (batch, heads, keys, head_dim). `mask`
broadcasts to (batch, heads, queries, keys). It is added to the scores, or if bool, is True where a
query may attend. A query that may attend to no key gets zeros, as in PyTorch's kernels, not NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]

HALF = (torch.bfloat16, torch.float16)
FEW, SOME = 64, 256  # keys, in half precision on a CPU


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """PyTorch's fused attention."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=scale
    )


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """`sdpa`, except for half precision on a CPU.

    There, the backward of PyTorch's kernel is many times slower than in float32 (`python
    bench/attention_kernels.py` measures it). Up to `FEW` keys plain products are used, up to
    `SOME` keys the kernel in float32.
    """
    keys = k.shape[-2]
    if q.device.type != "cpu" or q.dtype not in HALF or keys > SOME:
        return sdpa(q, k, v, mask=mask, scale=scale)
    if keys <= FEW:
        return eager(q, k, v, mask=mask, scale=scale)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    with torch.autocast("cpu", enabled=False):
        return sdpa(q.float(), k.float(), v.float(), mask=mask, scale=scale).to(q.dtype)


def eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The same as `sdpa` with an explicit softmax; the reference in tests."""
    return eager_with_probs(q, k, v, mask=mask, scale=scale)[0]


def eager_with_probs(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, queries, head_dim) and probabilities (batch, heads, queries, keys)."""
    probs = attention_probs(attention_scores(q, k, scale), mask).to(v.dtype)
    return probs @ v, probs


def attention_scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Scaled dot products before mask and softmax, (batch, heads, queries, keys)."""
    return (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)


def attention_probs(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Masked softmax over keys, computed in at least float32 and returned so."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is None:
        return scores.softmax(dim=-1)
    is_bool = mask.dtype == torch.bool
    scores = scores.masked_fill(~mask, float("-inf")) if is_bool else scores + mask
    # softmax of a row of -inf is NaN, and so is its gradient: fill the row before, zero it after
    blind = torch.isneginf(scores).all(dim=-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(dim=-1).masked_fill(blind, 0.0)


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "eager": eager}
