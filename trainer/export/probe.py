"""A fixed question to models, whose answers show whether a file gives the model it was written
from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trainer.attention.context import StepContext, use
from trainer.attention.further_conditions import told_groups
from trainer.attention.input_channels import inputs_read
from trainer.backbones.device import CPU, Placement, proving
from trainer.backbones.image_encoder import ImageEncoder
from trainer.data.references import REFERENCE

LIMIT = 1e-5  # the largest difference allowed in the denoiser's output, in fp32
NOISE = 2e-6  # a difference that the order of fp32 sums can make
PROOF_SIDE = 16  # the largest side of the latents
PROOF_FRAMES = 4  # of a clip, for models with temporal layers
Say = Callable[[str], None]


class Probe:
    """A fixed question to any model: the denoiser's output at two noise levels, for a prompt with
    `words` and for an empty one.

    A model that reads reference pictures is given one for each.

    frames: 1 asks for two images, more for two clips of so many frames; placement: where models
    are asked, each of which is on the CPU before and after.
    """

    def __init__(
        self, model: Any, words: Iterable[str], frames: int = 1, *, placement: Placement = CPU
    ) -> None:
        side = min(model.resolution // model.divisor, PROOF_SIDE)
        generator = torch.Generator().manual_seed(0)
        shape = (2 * frames, model.latent_channels, side, side)
        self.placement, device = placement, placement.device
        self.x_t = torch.randn(shape, generator=generator).to(device)
        self.t = torch.tensor([150, 700], device=device).repeat_interleave(frames)
        self.ctx = StepContext(0, 1, self.t, frames=frames)
        self.prompts = [model.prompts.example(tuple(words)), ""]
        self.inputs = _pictures(model, generator)

    @torch.no_grad()
    def __call__(self, model: Any) -> Tensor:
        """The model's output (2 * frames, c, h, w), in fp32 on the CPU."""
        with proving(model, self.placement):
            condition = model.encode_prompts(self.prompts)
            if self.inputs:
                inputs = {name: value.to(self.x_t.device) for name, value in self.inputs.items()}
                condition = told_groups(model, condition, inputs, sees=(True,))
            condition = condition.per_frame(self.ctx.frames)
            ctx = replace(self.ctx, condition=condition)
            with use(ctx):
                output: Tensor = model.predict(self.x_t, self.t, condition)
        return output.float().cpu()


def _pictures(model: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """A reference picture for each of two rows, of the sides that an encoder takes, so that no
    reader scales it; none for a model that reads none."""
    sides = [own.side for own in model.extras.values() if isinstance(own, ImageEncoder)]
    if not sides or REFERENCE not in inputs_read(model):
        return {}
    values = torch.randint(0, 256, (2, 1, 3, sides[0], sides[0]), generator=generator)
    return {REFERENCE: values / 127.5 - 1}


def difference(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference; infinite where a value of either is not finite."""
    largest = (one - other).abs().max()
    return float(largest) if torch.isfinite(largest) else float("inf")
