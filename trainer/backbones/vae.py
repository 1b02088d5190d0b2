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


def scale_latents(vae: Any, latents: Tensor) -> Tensor:
    """What a VAE encodes, as the denoiser takes it: (z - shift) * factor, by the VAE's config."""
    config = vae.config
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def unscale_latents(vae: Any, latents: Tensor) -> Tensor:
    """What a denoiser gives, as the VAE decodes it: the inverse of `scale_latents`."""
    config = vae.config
    return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)


def with_widths(vae: Any) -> Any:
    """The VAE, its config with the widths under both names: a stock pipeline asks any VAE for those
    that its own model's VAE has."""
    for name, other in ((WIDTHS, "block_out_channels"), ("block_out_channels", WIDTHS)):
        if name not in vae.config:
            vae.register_to_config(**{name: vae.config[other]})
    return vae


def posterior_moments(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels (b, 3, H, W) in [-1, 1] to the posterior's mean and log-variance (b, 2c, h, w).
    `AutoencoderDC` and `AutoencoderTiny` have no posterior, only its mean."""
    import torch

    encoded = vae.encode(pixels)
    for name in ("latent", "latents"):
        if (mean := getattr(encoded, name, None)) is not None:
            return torch.cat([mean, torch.full_like(mean, EXACT)], dim=1)
    parameters: Tensor = encoded.latent_dist.parameters
    return parameters
