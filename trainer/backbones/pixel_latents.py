"""The place of a VAE in a family that has none: latents are the pixels themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from trainer.backbones.latent_form import COLOURS


class PixelLatents(nn.Module):
    """Encodes pixels (b, 3, H, W) as themselves and decodes them so, without a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.config = FrozenDict(latent_channels=COLOURS, scaling_factor=1.0, block_out_channels=())

    def encode(self, pixels: Tensor) -> Any:
        return SimpleNamespace(latent=pixels)

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=latents)
