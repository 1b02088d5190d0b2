"""What every VAE is asked, whichever class of diffusers it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = "encoder_block_out_channels"  # what AutoencoderDC calls block_out_channels
EXACT = -30.0  # a log-variance: noise of 3e-7


def pixels_per_latent(vae: Any) -> int:
    """Pixels along an edge per latent."""
    widths = vae.config.get(WIDTHS) or vae.config.block_out_channels
    return int(2 ** (len(widths) - 1))


def posterior_moments(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels (b, 3, H, W) in [-1, 1] to the posterior's mean and log-variance (b, 2c, h, w).
    `AutoencoderDC` has no posterior, only its mean."""
    import torch

    encoded = vae.encode(pixels)
    if hasattr(encoded, "latent"):
        return torch.cat([encoded.latent, torch.full_like(encoded.latent, EXACT)], dim=1)
    parameters: Tensor = encoded.latent_dist.parameters
    return parameters
