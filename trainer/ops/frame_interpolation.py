"""The known frames of a clip as further input channels of a network that makes the others.

    zeros:       s_i = [m_i x0_i, m_i]                                        c + 1 channels
    neighbours:  s_i = [x0_p, x0_n, (i - p) / k, (n - i) / k, m_i]          2 c + 3 channels

x0 are clean latents of a clip. m_i is 1 where frame i is known, else 0. p is the last known frame
at i or before it, n the first one at i or after it; where one of them is lacking, the other stands
for both, and its distance is negative in one of the two channels. k is the largest distance of two
known frames between which training has unknown ones. All is 0 where no frame is known.
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
    to `between` unknown frames between two. neighbours: which of the two forms of s is made."""

    between: int
    extrapolate: float
    blank: float
    neighbours: bool = False

    def count(self, channels: int) -> int:
        """Of s, for latents of so many channels."""
        return 2 * channels + 3 if self.neighbours else channels + 1

    def channels(self, given: ChannelInputs) -> Tensor | None:
        """s (b f, n, h, w) with n of `count`, of the known frames that a caller names, or of drawn
        ones; None for pictures, and without a clip."""
        if given.x0 is None or given.frames == 1:
            return None
        known = given.inputs.get(KNOWN)
        if known is None:
            known = torch.stack([self.draw(given.frames, seed) for seed in given.seeds])
        clips = given.x0.unflatten(0, (-1, given.frames))
        if self.neighbours:
            return neighbour_channels(clips, known, self.between + 1)
        return known_channels(clips, known)

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


def neighbour_channels(clips: Tensor, known: Tensor, reach: int) -> Tensor:
    """Of clean latents (b, f, c, h, w), for every frame the known ones before and after it, how far
    they are in units of `reach` frames, and which frames are known (b, f): channels (b f, 2 c + 3,
    h, w)."""
    known = known.to(clips.device)
    before, after = _neighbours(known)
    place = torch.arange(known.shape[1], device=clips.device)
    told = torch.stack([(place - before) / reach, (after - place) / reach, known], 2)
    rows = torch.arange(len(clips), device=clips.device)[:, None]
    planes = told.to(clips)[..., None, None].expand(-1, -1, -1, *clips.shape[-2:])
    found = torch.cat([clips[rows, before], clips[rows, after], planes], 2)
    return (found * known.any(1).to(clips)[:, None, None, None, None]).flatten(0, 1)


def _neighbours(known: Tensor) -> tuple[Tensor, Tensor]:
    """The last known frame at each of (b, f) or before it, and the first one at it or after it;
    the other one where there is none, and frame 0 where none is known."""
    count = known.shape[1]
    place = torch.arange(count, device=known.device).expand_as(known)
    before = place.where(known, torch.full_like(place, -1)).cummax(1).values
    after = place.where(known, torch.full_like(place, count)).flip(1).cummin(1).values.flip(1)
    first, last = before.where(before >= 0, after), after.where(after < count, before)
    return first.where(first < count, torch.zeros_like(first)), last.clamp(min=0)
