"""One question put to every model alike, to see whether a file gives the model it was written
from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trainer.attention.context import StepContext, per_frame, use
from trainer.backbones.placement import CPU, Placement, proving

LIMIT = 1e-5  # of the denoiser's output in fp32
NOISE = 2e-6  # what the order of fp32 sums leaves open
PROOF_SIDE = 16  # latents along an edge, at most
PROOF_FRAMES = 4  # of a clip, where the model has layers that look through time


class Probe:
    """The denoiser's output at two noise levels, for a prompt with every new word and for none; of
    pictures, or of clips of so many frames. Each model is asked on the device of `placement` and
    goes back to the CPU."""

    def __init__(
        self,
        model: Any,
        words: Iterable[str],
        frames: int = 1,
        placement: Placement = CPU,
    ) -> None:
        side = min(model.resolution // model.divisor, PROOF_SIDE)
        generator = torch.Generator().manual_seed(0)
        rows = 2 * frames
        device, self.placement = placement.device, placement
        x_t = torch.randn(rows, model.latent_channels, side, side, generator=generator)
        self.x_t = x_t.to(device)
        self.t = torch.tensor([150, 700], device=device).repeat_interleave(frames)
        self.ctx = StepContext(0, 1, self.t, frames)
        self.prompts = [" ".join(("a photo of", *words)), ""]

    @torch.no_grad()
    def __call__(self, model: Any) -> Tensor:
        with proving(model, self.placement), use(self.ctx):
            condition = per_frame(model.encode_prompts(self.prompts), self.ctx.frames)
            answer: Tensor = model.predict(self.x_t, self.t, condition)
        return answer.float().cpu()


def difference(one: Tensor, other: Tensor) -> float:
    """The largest; infinite where either is not finite."""
    largest = (one - other).abs().max()
    return float(largest) if torch.isfinite(largest) else float("inf")
