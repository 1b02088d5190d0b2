"""A clip with fewer frames, or a smaller one, as further input channels of a network that makes the
complete one.

    z  = every `time`-th frame of x0, averaged over squares of `space` x `space`
    z' = sqrt(1 - l^2) z + l noise         noise conditioning augmentation at level l
    s  = [up(z'), m]                       frames repeated, pixels interpolated; m_i is 1 for the
                                           frames that z has, else 0

x0 are clean latents. The network is told l by an embedding beside that of the timestep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

from trainer.attention.given_frames import LEVEL
from trainer.attention.insertion import untouched
from trainer.ops.temporal.layers import WAVES, zeroed

if TYPE_CHECKING:
    from trainer.attention.context import StepContext
    from trainer.attention.input_channels import ChannelInputs

SCALE = 1000  # of levels in [0, 1], which then spread over the waves as timesteps do
CLIP, TOLD = "lower", "augmentation_level"  # names of the values


@dataclass(frozen=True)
class LowerClip:
    """What a network is told of a clip that lacks frames or pixels. Without noise of a level that a
    caller names, that of each clip is uniform in [0, most). The values are None for pictures, where
    frames are lacking, and without a clip."""

    time: int
    space: int
    most: float

    def channels(self, given: ChannelInputs) -> Tensor | None:
        """s (b f, c + 1, h, w)."""
        if not self._told(given):
            return None
        assert given.x0 is not None
        clips = given.x0.unflatten(0, (-1, given.frames))
        z = lowered(clips, self.time, self.space)
        noise = [torch.randn(z.shape[1:], generator=drawing(seed)) for seed in given.seeds]
        z = augmented(z, self.of_clips(given), torch.stack(noise).to(z))
        has = (torch.arange(given.frames, device=z.device) % self.time == 0).to(z)
        mask = has[None, :, None, None, None].expand_as(clips[:, :, :1])
        return torch.cat([raised(z, clips, self.time), mask], 2).flatten(0, 1)

    def levels(self, given: ChannelInputs) -> Tensor | None:
        """l of each row (b f, 1, 1, 1)."""
        if not self._told(given):
            return None
        return self.of_clips(given).repeat_interleave(given.frames)[:, None, None, None]

    def of_clips(self, given: ChannelInputs) -> Tensor:
        """l of each clip (b,)."""
        named = given.inputs.get(LEVEL)
        if named is not None:
            return named
        drawn = [torch.rand((), generator=drawing(seed ^ 1)) for seed in given.seeds]
        return self.most * torch.stack(drawn)

    def _told(self, given: ChannelInputs) -> bool:
        return given.x0 is not None and (given.frames > 1 or self.time == 1)


def drawing(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lowered(clips: Tensor, time: int, space: int) -> Tensor:
    """Clean latents (b, f, c, h, w) to z: (b, f / time, c, h / space, w / space), rounded up in
    time, and down in space to one at least."""
    few = clips[:, ::time]
    if space == 1:
        return few
    height, width = (max(1, side // space) for side in clips.shape[-2:])
    return F.adaptive_avg_pool2d(few.flatten(0, 1), (height, width)).unflatten(0, few.shape[:2])


def augmented(z: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """z' of z and noise (b, f, c, h, w), level (b,)."""
    level = level.to(z)[:, None, None, None, None]
    return (1 - level.square()).sqrt() * z + level * noise


def raised(z: Tensor, like: Tensor, time: int) -> Tensor:
    """z (b, f', c, h', w') with each frame `time` times, in the shape of `like` (b, f, c, h, w)."""
    place = torch.arange(like.shape[1], device=z.device) // time
    rows = z.flatten(0, 1)
    if rows.shape[-2:] != like.shape[-2:]:
        rows = F.interpolate(rows, like.shape[-2:], mode="bilinear", align_corners=False)
    return rows.unflatten(0, z.shape[:2])[:, place]


class AugmentationLevel(nn.Module):
    """y = x + W2 silu(W1 sines(1000 l)), for the embedding x (b f, d) of the timestep; W2 and its
    bias zero. Without a given clip nothing is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = TimestepEmbedding(WAVES, width)
        zeroed(self.embedding.linear_2)

    def forward(self, x: Tensor, before: Tensor, ctx: StepContext) -> Tensor:
        told = ctx.channels.get(TOLD)
        if told is None:
            return untouched(x, self)
        waves = get_timestep_embedding(
            SCALE * told.flatten().to(x.device),
            WAVES,
            flip_sin_to_cos=True,
            downscale_freq_shift=0,
        )
        return x + self.embedding(waves.to(x.dtype)).to(x.dtype)
