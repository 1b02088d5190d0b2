"""How important tokens are to each other, from the map of attention.

Generalised weighted page rank (AT-EDM, Wang et al., arXiv 2405.05252, section 3.2; Zero-TPrune,
Wang et al., arXiv 2305.17328, equation 1): a token counts that tokens which count attend to,

    s <- A^T s / sum(A^T s)        from s = 1 / n

A is averaged over heads, and holds every `stride`-th row of the map, so that a fused kernel can
compute the attention itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCORES = 2**22  # of all heads, that are computed at once


def attention_map(q: Tensor, k: Tensor, scale: float | None = None, *, stride: int = 1) -> Tensor:
    """The probabilities of every `stride`-th query (b, n / stride, m), averaged over heads, in
    fp32, of q (b, h, n, d) and k (b, h, m, d)."""
    q = q[:, :, ::stride] * (q.shape[-1] ** -0.5 if scale is None else scale)
    rows = max(1, SCORES // (k.shape[0] * k.shape[1] * k.shape[2]))
    parts = [
        (part @ k.transpose(2, 3)).float().softmax(-1).mean(1) for part in q.split(rows, dim=2)
    ]
    return torch.cat(parts, dim=1)


def page_rank(a: Tensor, *, stride: int = 1, iterations: int = 5) -> Tensor:
    """Importance (b, n) of the tokens, of sum 1, from every `stride`-th row of the map, a (b, n /
    stride, n)."""
    s = a.new_full((len(a), a.shape[2]), 1 / a.shape[2])
    for _ in range(iterations):
        s = (s[:, None, ::stride] @ a)[:, 0]
        s = s / s.sum(-1, keepdim=True)
    return s


def donors(q: Tensor, k: Tensor, *, kept: Tensor, left: Tensor) -> Tensor:
    """For each token in `left` (b, l) the place in `kept` (b, k) of the kept token that it attends
    to the most, by the geometric mean of the map over heads, (b, l)."""
    one, other = (x.transpose(1, 2).flatten(2) for x in (q, k))  # b n (h d)
    width = one.shape[-1]
    asks = one.gather(1, left[..., None].expand(-1, -1, width))
    asked = other.gather(1, kept[..., None].expand(-1, -1, width))
    return (asks @ asked.transpose(1, 2)).argmax(-1)
