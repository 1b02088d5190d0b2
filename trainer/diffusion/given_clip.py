"""A clip that is given to a model which makes the complete one: frames between its own, before and
after them, or more pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.attention.given_frames import KNOWN, LEVEL, GivenFrames
from trainer.backbones.backbone import Backbone
from trainer.common.seeds import seed_of
from trainer.diffusion.channel_values import channels_for
from trainer.diffusion.sampler import DEFAULT, sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.diffusion.source_clip import mean_latents


@dataclass(frozen=True, eq=False)
class GivenClip:
    """Clean latents x0 (f, c, h, w) of a complete clip, zeros for those of its frames that `known`
    (f,) says are not given. where: how they were placed."""

    x0: Tensor
    known: Tensor
    where: GivenFrames

    @classmethod
    def of(cls, latents: Tensor, where: GivenFrames, frames: int) -> GivenClip:
        """The given frames' latents (f', c, h, w) in their places among `frames`.

        Raises:
            ValueError: there are other places than given frames.
        """
        places = list(where.places(frames))
        if len(places) != len(latents):
            raise ValueError(
                f"{len(latents)} frames are given, and {frames} frames have {len(places)} places "
                "for them; give so many"
            )
        x0 = latents.new_zeros(frames, *latents.shape[1:])
        x0[places] = latents
        known = torch.zeros(frames, dtype=torch.bool)
        known[places] = True
        return cls(x0, known, where)

    @classmethod
    def of_pictures(cls, backbone: Backbone, clip: Tensor, where: GivenFrames) -> GivenClip:
        """Those frames of a complete clip (f, 3, H, W) in [-1, 1] that are to be given."""
        frames = len(clip)
        shown = clip[list(where.places(frames))]
        return cls.of(mean_latents(backbone, shown), where, frames)

    def channels(
        self, backbone: Backbone, seeds: Sequence[int], settings: Sampling
    ) -> dict[str, Tensor]:
        """The values of the model's further input channels for a clip of each seed."""
        count = len(seeds)
        inputs = {KNOWN: self.known.expand(count, -1)}
        if self.where.level is not None:
            inputs[LEVEL] = torch.full((count,), self.where.level)
        own = [seed_of(seed, "given clip") for seed in seeds]
        x0 = self.x0.repeat(count, 1, 1, 1)
        return channels_for(backbone, own, settings, inputs=inputs, x0=x0)


@torch.no_grad()
def complete(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    given: GivenClip,
    settings: Sampling = DEFAULT,
) -> Tensor:
    """Clips (b * frames, 3, H, W) in [-1, 1], one for each prompt and seed, as `sample` makes them,
    that complete a given one. The given frames are as the VAE gives them where the model keeps
    them.

    Raises:
        ValueError: as `sample`, and for a clip of another number of frames.
    """
    if len(given.x0) != settings.frames:
        raise ValueError(
            f"the given clip is placed among {len(given.x0)} frames, and frames={settings.frames} "
            "are to be made"
        )
    channels = given.channels(backbone, seeds, settings)
    clips = sample(backbone, prompts, seeds, settings=settings, channels=channels)
    if given.where.kept:
        own = backbone.decode(given.x0[given.known]).to(clips)
        rows = clips.unflatten(0, (len(prompts), -1))
        rows[:, given.known.to(clips.device)] = own
    return clips
