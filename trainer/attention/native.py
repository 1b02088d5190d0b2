"""What the model's own layers compute between their projections, without any op: softmax attention
in most layers, linear attention in those that declare it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainer.kernels.linear_attention import relu_attention
from trainer.kernels.softmax import softmax_attention

if TYPE_CHECKING:
    from trainer.attention.sites import Site


def split_heads(site: Site, *, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of the projections, (b, . , h * d), as normalised heads (b, h, . , d)."""
    attn: Any = site.module
    if site.native.norms_first:
        q, k = _normed(attn, q, k)
    q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
    if not site.native.norms_first:
        q, k = _normed(attn, q, k)
    return q, k, v


def _normed(attn: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    q = q if attn.norm_q is None else attn.norm_q(q)
    return q, k if attn.norm_k is None else attn.norm_k(k)


def attend(site: Site, *, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """o (b, h, n, d) of q (b, h, n, d), k and v (b, h, m, d)."""
    if not site.native.linear:
        return softmax_attention(q, k, v, mask=mask, scale=site.scale)
    if mask is not None:
        raise ValueError(
            f"attention at {site.name!r} is linear, as its model was trained, and cannot use "
            "the mask it was called with; call it without one"
        )
    return relu_attention(q, k, v)
