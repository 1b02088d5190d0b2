"""Types of what a method does to the latents while a clip is sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Denoise(Protocol):
    """A sampler at work: `x_t` (b f, c, h, w) from before step `first` to before step `last`, of
    clips with as many frames as there are rows for."""

    @property
    def steps(self) -> int: ...

    def __call__(self, x_t: Tensor, first: int, last: int) -> Tensor: ...

    def level(self, step: int) -> tuple[float, float]:
        """alpha and sigma of the latents before a step."""
        ...


# from noise (b f, c, h, w), the number of frames and a sampler to where the clips begin: latents,
# and the step before which they stand
Start = Callable[[Tensor, int, Denoise], tuple[Tensor, int]]
# after a step, what else is done to the latents: (latents, x0 by the network, step, steps, frames)
Guide = Callable[[Tensor, Tensor, int, int, int], Tensor]
