"""Temporal attention limited to earlier frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.attention.op import Traits

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall


class Directed:
    """An op of a temporal site: frame i sees frames up to i, by a mask before the softmax."""

    name = "directed"
    traits = Traits(owner="magicvideo")

    def mask(self, mask: Tensor | None, q: Tensor, k: Tensor, call: SiteCall) -> Tensor:
        seen = causal_frames(q.shape[2], k.shape[2], q.device)
        if mask is None:
            return seen
        return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))


class DirectedAfter:
    """The same, by a mask after the softmax: no value of a later frame reaches frame i, but the
    probability it gave to later frames is lost, so its probabilities sum to less than 1."""

    name = "directed"
    traits = Traits(owner="magicvideo", scores=True)

    def probs(self, probs: Tensor, call: SiteCall) -> Tensor:
        return probs * causal_frames(probs.shape[-2], probs.shape[-1], probs.device)


def causal_frames(frames: int, keys: int, device: torch.device) -> Tensor:
    """(f, keys), True where a frame may attend; keys appended after the frames are for all."""
    seen = torch.ones(frames, frames, dtype=torch.bool, device=device).tril()
    return F.pad(seen, (0, keys - frames), value=True)
