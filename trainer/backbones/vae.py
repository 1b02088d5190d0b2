"""What every VAE is asked, whichever class of diffusers it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.backbones.latent_form import WIDTHS, LatentForm

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

EXACT = -30.0  # a log-variance: noise of 3e-7
SLICE = 512 * 512  # pixels that a VAE takes at once, at least one picture
TILED = 1024 * 1024  # pixels of a picture above which it is computed in overlapping tiles
PLAIN = LatentForm()


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


def scale_latents(vae: Any, latents: Tensor, form: LatentForm = PLAIN) -> Tensor:
    """Folded latents of a VAE, (b, c, h, w), as the denoiser takes them, see `LatentForm`."""
    if form.statistics is not None:
        mean, std = statistics_of(vae, form, latents)
        return (latents - mean) / std
    config = vae.config
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def unscale_latents(vae: Any, latents: Tensor, form: LatentForm = PLAIN) -> Tensor:
    """What a denoiser gives, as folded latents of the VAE: the inverse of `scale_latents`."""
    if form.statistics is not None:
        mean, std = statistics_of(vae, form, latents)
        return latents * std + mean
    config = vae.config
    return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)


def statistics_of(vae: Any, form: LatentForm, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, c, 1, 1) of the channels of folded latents."""
    assert form.statistics is not None
    mean, std = (value.to(latents).view(1, -1, 1, 1) for value in form.statistics(vae))
    return mean, std


def decode_latents(vae: Any, latents: Tensor, form: LatentForm = PLAIN) -> Tensor:
    """What a denoiser gives, (b, c, h, w), to pixels (b, 3, H, W)."""
    from torch.nn.functional import pixel_shuffle

    z = unscale_latents(vae, latents, form)
    z = z if form.fold == 1 else pixel_shuffle(z, form.fold)
    pixels: Tensor = vae.decode(z[:, :, None] if form.clips else z).sample
    return pixels[:, :, 0] if form.clips else pixels


def folded_moments(vae: Any, pixels: Tensor, form: LatentForm = PLAIN) -> Tensor:
    """Pixels (b, 3, H, W) to the posterior's mean and log-variance (b, 2c, h, w), folded."""
    from torch.nn.functional import pixel_unshuffle

    if form.clips:
        moments = posterior_moments(vae, pixels[:, :, None])[:, :, 0]
    else:
        moments = posterior_moments(vae, pixels)
    return moments if form.fold == 1 else pixel_unshuffle(moments, form.fold)


def with_widths(vae: Any) -> Any:
    """The VAE, its config with the widths under both names: a stock pipeline asks any VAE for those
    that its own model's VAE has."""
    for name, other in ((WIDTHS, "block_out_channels"), ("block_out_channels", WIDTHS)):
        if name not in vae.config:
            vae.register_to_config(**{name: vae.config[other]})
    return vae


def posterior_moments(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels (b, 3, H, W) in [-1, 1], or clips (b, 3, f, H, W), to the posterior's mean and
    log-variance (b, 2c, h, w), or (b, 2c, f', h, w).
    `AutoencoderDC` and `AutoencoderTiny` have no posterior, only its mean."""
    import torch

    encoded = vae.encode(pixels)
    for name in ("latent", "latents"):
        if (mean := getattr(encoded, name, None)) is not None:
            return torch.cat([mean, torch.full_like(mean, EXACT)], dim=1)
    parameters: Tensor = encoded.latent_dist.parameters
    return parameters
