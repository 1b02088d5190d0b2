"""Sampling of clips of which a part is known, by hooks of the sampler (Video diffusion models,
arXiv 2204.03458, section 3.1).

With x_a what is known and x_a(z_t) what the network makes of it at a step, the frames that are not
known are moved so that it makes of x_a what is known (equation 7, reconstruction guidance):

    x_b <- x_b(z_t) - w alpha_t / 2 d/dz_t || x_a - x_a(z_t) ||^2

the sum of squares over all that is known of a clip, the gradient through the whole network and the
guidance by text. The known frames themselves are x_a: any sampler then takes them along the forward
process from x_a exactly. With w = 0 that is all, the replacement method. Where x_a is known at a
lower resolution alone, x_a(z_t) is shrunk as x_a is and nothing is replaced (equation 8).

All of it is of latents, where the model has them: the paper's models work on pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from trainer.attention.context import StepContext
from trainer.attention.hooks import Predict, Prediction, SamplingHook
from trainer.diffusion.known_frames import KnownFrames

CORRECTION = 0.1  # the paper's step size of Langevin


@dataclass(frozen=True)
class Reconstruction:
    """Equations 7 and 8 of the paper. known: of all clips of a batch; weight: w."""

    known: tuple[KnownFrames, ...]
    weight: float

    @property
    def hook(self) -> SamplingHook:
        return SamplingHook(combine=self.combine, differentiates=self.weight > 0)

    def combine(self, prediction: Prediction, ctx: StepContext) -> Tensor:
        """A hook of the sampler: the output (b f, c, h, w) that means the clips as described."""
        known = [each.to(prediction.x_t) for each in self.known]
        clips = prediction.x0.unflatten(0, (-1, ctx.frames))
        if self.weight:
            slope = slope_of(known, prediction, clips)
            alpha = prediction.level[0].to(clips).unflatten(0, (-1, ctx.frames))
            clips = clips - self.weight * alpha / 2 * slope
        clips = clips.detach().clone()
        for each in known:
            if each.shrink == 1:
                clips[:, list(each.at)] = each.latents
        return prediction.meaning(clips.flatten(0, 1))


def slope_of(known: Sequence[KnownFrames], prediction: Prediction, clips: Tensor) -> Tensor:
    """The gradient (n, f, c, h, w), by the latents before the step, of the distance between what is
    known and what the clips (n, f, c, h, w) of a prediction show of it.

    Raises:
        ValueError: no frame depends on another one.
    """
    distance = sum((each.seen_in(clips) - each.latents).square().sum() for each in known)
    assert isinstance(distance, Tensor)
    (slope,) = torch.autograd.grad(distance, prediction.x_t, retain_graph=True)
    found = slope.unflatten(0, clips.shape[:2])
    if all(each.shrink == 1 for each in known):
        seen = {number for each in known for number in each.at}
        others = [number for number in range(clips.shape[1]) if number not in seen]
        if others and not found[:, others].any():
            raise ValueError(
                "this model makes every frame by itself, so that known frames say nothing of the "
                "others; take one with layers through time, as adapter=tiny_motion, or give "
                "reconstruction=0"
            )
    return found


@dataclass(frozen=True)
class Langevin:
    """The corrector of the paper's predictor-corrector sampler: at each noise level that a step of
    the sampler has come to, `steps` times

        z <- z - size / 2 sigma noise(z) + sqrt(size) sigma n,   n of unit variance

    generators: that of each clip, from which n is drawn.
    """

    generators: Sequence[torch.Generator]
    steps: int
    size: float = CORRECTION

    @property
    def hook(self) -> SamplingHook:
        return SamplingHook(before_step=self.before_step)

    def before_step(self, x_t: Tensor, predict: Predict, ctx: StepContext) -> Tensor:
        """A hook of the sampler; before the first step there is nothing to correct."""
        if ctx.step == 0:
            return x_t
        for _ in range(self.steps):
            found = predict(x_t)
            alpha, sigma = (part.to(x_t) for part in found.level)
            noise = (x_t - alpha * found.x0) / sigma
            shape = (ctx.frames, *x_t.shape[1:])
            drawn = torch.cat([torch.randn(shape, generator=own) for own in self.generators])
            x_t = x_t - self.size / 2 * sigma * noise + sqrt(self.size) * sigma * drawn.to(x_t)
        return x_t
