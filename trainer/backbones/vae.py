"""What every VAE is asked, whichever class of diffusers it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.backbones.compression import Compression, compression_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

WIDTHS = "encoder_block_out_channels"  # what AutoencoderDC calls block_out_channels
EXACT = -30.0  # a log-variance: noise of 3e-7
SLICE = 512 * 512  # pixels that a VAE takes at once, at least one picture
TILED = 1024 * 1024  # pixels of a picture above which it is computed in overlapping tiles
TOGETHER = 8  # frames that a VAE of video holds at once, about
TILED_CLIP = 2 * TILED  # pixels of so many frames above which all are computed in tiles


def in_slices(
    vae: Any, step: Callable[[Tensor], Tensor], rows: Tensor, *, pixels: int, frames: int = 1
) -> Tensor:
    """`step` over rows (b, ...), which are pictures of so many pixels or their latents, or clips of
    `frames` frames: as many at once as `SLICE` holds. What a VAE needs in memory grows with the
    pixels it takes at once, to 21 GB for 32 pictures of 512x512. Larger pictures than `TILED` are
    computed in tiles, and clips of which a few frames are more than `TILED_CLIP`."""
    import torch

    if hasattr(vae, "enable_tiling"):
        large = pixels > TILED or pixels * min(frames, TOGETHER) > TILED_CLIP
        vae.enable_tiling() if large else vae.disable_tiling()
    at_once = max(1, SLICE // (pixels * frames))
    if len(rows) <= at_once:
        return step(rows)
    return torch.cat([step(part) for part in rows.split(at_once)])


def compression(vae: Any) -> Compression:
    """How much smaller its latents are than pixels."""
    found = compression_of(type(vae).__name__, vae.config)
    assert found is not None, "a VAE of a known class"
    return found


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


def encoded(vae: Any, pixels: Tensor, frames: int = 1) -> Tensor:
    """Rows of pixels (b f, 3, H, W), the frames of a clip adjacent, to the moments of their
    latents (b f', 2c, h, w): f' is f for a VAE of images, see `Compression`."""
    from functools import partial

    from trainer.backbones.layout import clips_to_rows, rows_to_clips

    step, size = partial(posterior_moments, vae), pixels.shape[-2] * pixels.shape[-1]
    if not compression(vae).in_time:
        return in_slices(vae, step, pixels, pixels=size)
    clips = rows_to_clips(pixels, frames)
    return clips_to_rows(in_slices(vae, step, clips, pixels=size, frames=frames))


def decoded(vae: Any, latents: Tensor, frames: int = 1) -> Tensor:
    """Rows of latents as the VAE decodes them (b f', c, h, w), with `frames` latent frames in a
    clip, to pixels (b f, 3, H, W)."""
    from trainer.backbones.layout import clips_to_rows, rows_to_clips

    known = compression(vae)
    size = latents.shape[-2] * latents.shape[-1] * known.pixels**2

    def step(part: Tensor) -> Tensor:
        sample: Tensor = vae.decode(part, **_timed(vae, part)).sample
        return sample

    if not known.in_time:
        return in_slices(vae, step, latents, pixels=size)
    clips, shown = rows_to_clips(latents, frames), known.frames_of(frames)
    return clips_to_rows(in_slices(vae, step, clips, pixels=size, frames=shown))


def _timed(vae: Any, latents: Tensor) -> dict[str, Any]:
    """The timestep of a VAE whose decoder removes noise too: that of none, as in the stock pipeline
    of LTX-Video."""
    if not vae.config.get("timestep_conditioning"):
        return {}
    return {"temb": latents.new_zeros(len(latents))}
