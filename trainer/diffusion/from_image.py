"""Image to image: sampling begins from a picture with noise over it, in place of noise alone.

    x_t = alpha(t) x0 + sigma(t) noise,   t the first of the last int(steps * strength) steps

SDEdit (arXiv 2108.01073); the rule of the steps, and the order in which the posterior and the noise
are drawn from a seed, are those of diffusers' image-to-image pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trainer.diffusion.sampler_loop import Denoising


@dataclass(frozen=True)
class InitialImage:
    """A picture to begin from. pixels: (1, 3, H, W) in [-1, 1]; strength: the share of the steps
    that are done, 1 for all.

    Raises:
        ValueError: a strength that is not above 0 and at most 1.
    """

    pixels: Tensor
    strength: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength:g} must be above 0 and at most 1")

    def first_step(self, steps: int) -> int:
        """How many steps are left out.

        Raises:
            ValueError: all of them.
        """
        done = min(int(steps * self.strength), steps)
        if done < 1:
            raise ValueError(
                f"strength={self.strength:g} of {steps} steps is no step; give more of either"
            )
        return steps - done


@torch.no_grad()
def noised(
    denoising: Denoising, image: InitialImage, generators: Sequence[torch.Generator]
) -> tuple[Tensor, int]:
    """The latents (b, c, h, w) that sampling begins from, one for each generator, and the place of
    their timestep among the scheduler's."""
    backbone, device = denoising.backbone, denoising.backbone.device
    left_out = image.first_step(denoising.steps)
    moments = backbone.moments(image.pixels.to(device))
    shape = moments.chunk(2, dim=1)[0].shape
    drawn = torch.cat([torch.randn(shape, generator=own) for own in generators])
    x0 = backbone.latents(moments.expand(len(generators), -1, -1, -1), drawn.to(moments))
    noise = torch.cat([torch.randn(shape, generator=own) for own in generators]).to(x0)
    scheduler = denoising.scheduler(0, device)
    first = left_out * int(scheduler.order)
    scheduler = denoising.scheduler(first, device)
    t = scheduler.timesteps[first : first + 1]
    if hasattr(scheduler, "scale_noise"):  # of a flow
        x_t: Tensor = scheduler.scale_noise(x0, t, noise)
    else:
        x_t = scheduler.add_noise(x0, noise, t.repeat(len(x0)))
    return x_t, first
