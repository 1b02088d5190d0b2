"""Shifted sparse attention: S2-Attn of LongLoRA (arXiv 2309.12307, section 3.2).

Tokens attend inside groups of G neighbours only, O(n G) in place of O(n^2). In half of the heads
the groups begin G / 2 later, so that what one group learns reaches the next. The paper rolls those
heads around the end, which puts the first and the last tokens in one group; here, as in its code
for fused kernels, the first half group and what is left over at the end are groups of their own,
and nothing is rolled.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainer.attention.op import Traits
from trainer.kernels.softmax import softmax_attention

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall


class ShiftedSparse(nn.Module):
    """A kernel op: S2-Attn in training, all of attention otherwise, as in the paper.

    group: a share of the n tokens up to 1, or a number of tokens above it. Training is a forward
    that will have a backward of a module in training mode.
    """

    name = "shifted_sparse"
    traits = Traits(owner="longlora", more_keys=False, grid=True)

    def __init__(self, group: float) -> None:
        super().__init__()
        self.group = group

    def size(self, tokens: int) -> int:
        share = self.group * tokens if self.group <= 1 else self.group
        return max(1, round(share))

    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: SiteCall
    ) -> Tensor:
        scale = call.scale
        if self.training and torch.is_grad_enabled():
            if k.shape[2] != q.shape[2]:
                raise ValueError(
                    f"methods.longlora groups the tokens of {call.site.name}, where another method "
                    "appends keys that are in no group; choose other sites for one of them"
                )
            return shifted_sparse(q, k, v, mask=mask, scale=scale, group=self.size(q.shape[2]))
        return softmax_attention(q, k, v, mask=mask, scale=scale)


def shifted_sparse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, group: int
) -> Tensor:
    """q, k, v and the result (b, h, n, d) of self-attention; n need not divide by `group`, the last
    group is shorter then. One group of all tokens is full attention in every head."""
    if group >= q.shape[2]:
        return softmax_attention(q, k, v, mask=mask, scale=scale)
    plain = q.shape[1] - q.shape[1] // 2
    heads = [slice(plain), slice(plain, None)]
    parts = []
    for chosen, first in zip(heads, (0, group // 2), strict=True):
        bias = mask if mask is None or mask.shape[1] == 1 else mask[:, chosen]
        parts.append(
            grouped(
                q[:, chosen],
                k[:, chosen],
                v[:, chosen],
                mask=bias,
                scale=scale,
                group=group,
                first=first,
            )
        )
    return torch.cat(parts, dim=1)


def grouped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    scale: float | None,
    group: int,
    first: int,
) -> Tensor:
    """Attention inside consecutive groups: one of `first` tokens, then of `group`, the rest."""
    tokens = q.shape[2]
    whole = (tokens - first) // group
    if mask is not None:
        return softmax_attention(
            q, k, v, mask=inside(mask, tokens, group=group, first=first), scale=scale
        )
    edges = sorted({0, first, first + whole * group, tokens})
    parts = []
    for start, stop in pairwise(edges):
        count = whole if start == first and whole else 1
        # b h (count g) d -> b (h count) g d: every group a head of its own
        cut = [x[:, :, start:stop].unflatten(2, (count, -1)).flatten(1, 2) for x in (q, k, v)]
        o = softmax_attention(cut[0], cut[1], cut[2], scale=scale)
        parts.append(o.unflatten(1, (-1, count)).flatten(2, 3))
    return torch.cat(parts, dim=2)


def inside(mask: Tensor, tokens: int, *, group: int, first: int) -> Tensor:
    """A mask of another op's, (b, h or 1, n or 1, n), closed between groups: attention under it is
    exact but saves nothing."""
    number = (torch.arange(tokens, device=mask.device) - first).div(group, rounding_mode="floor")
    same = number[:, None] == number
    if mask.dtype == torch.bool:
        return mask & same
    return mask.masked_fill(~same, float("-inf"))
