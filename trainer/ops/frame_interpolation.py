"""The known frames of a clip as further input channels of a network that makes the others.

    s_i = [m_i x0_i, m_i]        c + 1 channels for frame i: m_i is 1 where it is known, else 0

x0 are clean latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.attention.given_frames import KNOWN

if TYPE_CHECKING:
    from trainer.attention.input_channels import ChannelInputs


@dataclass(frozen=True)
class Masking:
    """Which frames of a training clip are known: none in a share `blank` of the clips, the first or
    the last ones in a share `extrapolate`, and in the others every k-th from the first on, with 1
    to `between` unknown frames between two."""

    between: int
    extrapolate: float
    blank: float

    def channels(self, given: ChannelInputs) -> Tensor | None:
        """s (b f, c + 1, h, w), of the known frames that a caller names, or of drawn ones; None for
        pictures, and without a clip."""
        if given.x0 is None or given.frames == 1:
            return None
        known = given.inputs.get(KNOWN)
        if known is None:
            known = torch.stack([self.draw(given.frames, seed) for seed in given.seeds])
        return known_channels(given.x0.unflatten(0, (-1, given.frames)), known)

    def draw(self, frames: int, seed: int) -> Tensor:
        """(f,) bool; of `extrapolate`, one frame at least is known and one is not."""
        drawing = torch.Generator().manual_seed(seed)
        kind, side, number = torch.rand(3, generator=drawing).tolist()
        place = torch.arange(frames)
        if kind < self.blank:
            return place < 0
        if kind < self.blank + self.extrapolate:
            count = 1 + int(number * (frames - 1))
            return place < count if side < 0.5 else place >= frames - count
        return place % (2 + int(number * self.between)) == 0


def known_channels(clips: Tensor, known: Tensor) -> Tensor:
    """Clean latents (b, f, c, h, w), and which of their frames are known (b, f), as channels (b f,
    c + 1, h, w)."""
    mask = known[:, :, None, None, None].to(clips)
    return torch.cat([clips * mask, mask.expand_as(clips[:, :, :1])], 2).flatten(0, 1)
