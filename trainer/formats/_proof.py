"""One question put to every model alike, to see whether a file gives the model it was written
from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

LIMIT = 1e-5  # of the denoiser's output in fp32
NOISE = 2e-6  # what the order of fp32 sums leaves open
SIDE = 16  # latents along an edge, at most


class Probe:
    """The denoiser's output at two noise levels, for a prompt with every new word and for none."""

    def __init__(self, model: Any, words: Iterable[str]) -> None:
        side = min(model.resolution // model.divisor, SIDE)
        generator = torch.Generator().manual_seed(0)
        self.x_t = torch.randn(2, model.latent_channels, side, side, generator=generator)
        self.t = torch.tensor([150, 700])
        self.prompts = [" ".join(("a photo of", *words)), ""]

    @torch.no_grad()
    def __call__(self, model: Any) -> Tensor:
        condition = model.encode_prompts(self.prompts)
        answer: Tensor = model.predict(self.x_t, self.t, condition)
        return answer.float()


def difference(one: Tensor, other: Tensor) -> float:
    """The largest; infinite where either is not finite."""
    largest = (one - other).abs().max()
    return float(largest) if torch.isfinite(largest) else float("inf")
