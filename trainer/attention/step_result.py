"""What one training step found out, for the extra losses of methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.data.loader import Batch


@dataclass(frozen=True, eq=False)
class StepResult:
    """One forward of the training loss; a clip's frames are adjacent rows.

    losses (b,) of each sample before the batch's own weights. x_t, output (b f, c, h, w): the noisy
    latents and what the denoiser answered. t (b f,): the timestep of each row. maps: attention maps
    by name, where a task keeps them. convert: from output, x_t and t to x0. levels (b,): at which
    share of the range of timesteps each sample is, in [0, 1), where a task has such a range.
    """

    losses: Tensor
    x_t: Tensor
    output: Tensor
    t: Tensor
    batch: Batch
    convert: Callable[[Tensor, Tensor, Tensor], Tensor] = field(repr=False)
    maps: Mapping[str, Tensor] | None = None
    levels: Tensor | None = None

    @cached_property
    def x0_hat(self) -> Tensor:
        """The clean latents (b f, c, h, w) that the output means, with its gradient; computed when
        first asked for."""
        return self.convert(self.output, self.x_t, self.t)
