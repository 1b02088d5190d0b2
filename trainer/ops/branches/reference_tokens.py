"""Tokens of reference pictures: a frozen encoder and a trained projector, which methods keep among
the extra modules under names of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.backbones.image_encoder import Seen


def reference_tokens(
    model: Any, pictures: Tensor, present: Tensor, *, encoder: str, projector: str
) -> Tensor:
    """Of b samples with k pictures each, (b, k, 3, H, W) in [-1, 1], their tokens (b, k, n, d);
    where `present` (b,) is not, those of no picture. encoder, projector: names of extra modules."""
    count, eye = pictures.shape[1], model.extras[encoder]
    seen, none = eye(pictures.flatten(0, 1)), eye.nothing(1)
    there = present.repeat_interleave(count)[:, None]
    shown = Seen(
        torch.where(there, seen.pooled, none.pooled),
        torch.where(there[..., None], seen.tokens, none.tokens),
    )
    tokens: Tensor = model.extras[projector](shown)
    return tokens.unflatten(0, (-1, count))
