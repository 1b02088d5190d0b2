"""What methods do to the latents of a clip while it is sampled: a start that moves, and a pull to
the frame before.

Latents are (b f, c, h, w), the frames of a clip adjacent. alpha and sigma are those of the path
x_t = alpha x0 + sigma noise, variance-preserving or flow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from trainer.attention.context import StepContext
from trainer.attention.hooks import Prediction, Sampler
from trainer.ops.temporal.background import Background


@dataclass(frozen=True)
class GlobalMotion:
    """The start of Text2Video-Zero (arXiv 2303.13439, section 3.3.1): the first frame is denoised
    alone up to a share `alone` of the steps, and further up to `until`; frame k is what that shows
    under a global translation by k * (x, y), noised again to the level of the first frame.

    x, y: of what a frame shows to the left and up, in widths and heights of the picture a frame.
    The noise is that from which frame k would have started. background: how it is smoothed, None
    for not at all; the clip is then sampled twice, once to find the object.
    """

    x: float
    y: float
    alone: float
    until: float
    background: Background | None = None

    def begin(self, noise: Tensor, sampler: Sampler) -> tuple[Tensor, int]:
        """A hook of the sampler. Pictures, and clips from latents that are given, begin there."""
        frames = sampler.frames
        if frames == 1 or sampler.given:
            return noise, 0
        first, last = (step_at(sampler.steps, part) for part in (self.alone, self.until))
        clips = noise.unflatten(0, (-1, frames))  # b f c h w
        started = sampler(clips[:, 0], 0, first)
        shown = sampler(started, first, last)
        levels = sampler.level(last), sampler.level(first)
        others = noised_again(self.moved(shown, frames)[:, 1:], clips[:, 1:], *levels)
        clips = torch.cat([started[:, None], others], 1)
        if self.background is not None:
            moved = partial(self.moved, frames=frames)
            clips = self.background.smoothed(clips, sampler, first, moved=moved)
        return clips.flatten(0, 1), first

    def moved(self, x: Tensor, frames: int) -> Tensor:
        """First frames (b, c, h, w) as all frames show them, (b, f, c, h, w)."""
        height, width = x.shape[-2:]
        shown = [
            translated(x, round(k * self.y * height), round(k * self.x * width))
            for k in range(frames)
        ]
        return torch.stack(shown, 1)


def step_at(steps: int, share: float) -> int:
    """A share of the steps, one at least where it is above 0: before the first there is nothing but
    noise, in which no motion would be left. A last step stays."""
    return min(max(round(share * steps), int(share > 0)), steps - 1)


def translated(x: Tensor, down: int, right: int) -> Tensor:
    """y[..., i, j] = x[..., i + down, j + right]; beyond its edges x is mirrored."""
    rows, columns = (
        mirrored(length, by, x.device)
        for length, by in zip(x.shape[-2:], (down, right), strict=True)
    )
    return x[..., rows[:, None], columns]


def mirrored(length: int, by: int, device: torch.device) -> Tensor:
    """Places 0 .. length - 1 moved by `by`, in a row that is mirrored at both ends: ..b a a b.."""
    position = (torch.arange(length, device=device) + by) % (2 * length)
    return torch.where(position < length, position, 2 * length - 1 - position)


def noised_again(
    x: Tensor, noise: Tensor, now: tuple[float, float], then: tuple[float, float]
) -> Tensor:
    """x from the level (alpha, sigma) `now` to the noisier `then`, by new noise:

    x_then = r x_now + sqrt(sigma_then^2 - r^2 sigma_now^2) noise,   r = alpha_then / alpha_now
    """
    ratio = then[0] / now[0]
    added = then[1] ** 2 - (ratio * now[1]) ** 2
    return ratio * x + sqrt(max(0.0, added)) * noise


@dataclass(frozen=True)
class LatentGuidance:
    """Pix2Video (arXiv 2303.12688, section 3.2): in the first `share` of the steps frame i > 0 goes
    down the gradient of its distance to the frame before, both as x0 by the network:

        x_i <- x_i - weight d/dx0_i mean((x0_i - x0_(i-1))^2),   the mean over c, h, w
    """

    weight: float
    share: float

    def after_step(self, x_t: Tensor, prediction: Prediction, ctx: StepContext) -> Tensor:
        """A hook of the sampler."""
        if ctx.frames == 1 or ctx.step >= self.share * ctx.num_steps:
            return x_t
        x0 = prediction.x0
        clips = x0.unflatten(0, (-1, ctx.frames))
        change = clips.diff(dim=1, prepend=clips[:, :1])  # 0 for the first
        return x_t - self.weight * 2 / x0[0].numel() * change.flatten(0, 1)
