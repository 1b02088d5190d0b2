"""What every VAE is asked, whichever class of diffusers it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

WIDTHS = "encoder_block_out_channels"  # what AutoencoderDC calls block_out_channels
EXACT = -30.0  # a log-variance: noise of 3e-7
SLICE = 512 * 512  # pixels that a VAE takes at once, at least one picture
TILED = 1024 * 1024  # pixels of a picture above which it is computed in overlapping tiles


def in_slices(vae: Any, step: Callable[[Tensor], Tensor], rows: Tensor, *, pixels: int) -> Tensor:
    """`step` over rows (b, ...), which are pictures of so many pixels or their latents: as many at
    once as `SLICE` holds. What a VAE needs in memory grows with the pixels it takes at once, to 21
    GB for 32 pictures of 512x512. Larger pictures than `TILED` are computed in tiles."""
    import torch

    if hasattr(vae, "enable_tiling"):
        vae.enable_tiling() if pixels > TILED else vae.disable_tiling()
    at_once = max(1, SLICE // pixels)
    if len(rows) <= at_once:
        return step(rows)
    return torch.cat([step(part) for part in rows.split(at_once)])


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
