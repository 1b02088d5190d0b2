"""What every VAE is asked, whichever class of diffusers it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.backbones.latent_form import WIDTHS, LatentForm

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from trainer.backbones.folder_contents import FolderContents
    from trainer.backbones.pipeline_folder import PipelineFolder

EXACT = -30.0  # a log-variance: noise of 3e-7
SLICE = 512 * 512  # pixels that a VAE takes at once, at least one picture
TILED = 1024 * 1024  # pixels of a picture above which it is computed in overlapping tiles
PLAIN = LatentForm()
TOGETHER = 8  # frames that a VAE of video holds at once, about
TILED_CLIP = 2 * TILED  # pixels of so many frames above which all are computed in tiles


def load_vae(folder: PipelineFolder, facts: FolderContents, form: LatentForm = PLAIN) -> Any:
    """The VAE of a folder, or what stands in its place in a family that has none."""
    if not form.vaes:
        from trainer.backbones.pixel_latents import PixelLatents

        return PixelLatents()
    import diffusers

    return folder.load("vae", getattr(diffusers, facts.vae))


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
    z = unfold_rows(unscale_latents(vae, latents, form), form)
    pixels: Tensor = vae.decode(z[:, :, None] if form.clips else z).sample
    return pixels[:, :, 0] if form.clips else pixels


def folded_moments(vae: Any, pixels: Tensor, form: LatentForm = PLAIN) -> Tensor:
    """Pixels (b, 3, H, W) to the posterior's mean and log-variance (b, 2c, h, w), folded."""
    if form.clips:
        moments = posterior_moments(vae, pixels[:, :, None])[:, :, 0]
    else:
        moments = posterior_moments(vae, pixels)
    return fold_rows(moments, form)


def fold_rows(rows: Tensor, form: LatentForm) -> Tensor:
    """Latents or moments of a VAE (b, c, h, w) as the denoiser has them, see `LatentForm.fold`."""
    from torch.nn.functional import pixel_unshuffle

    return rows if form.fold == 1 else pixel_unshuffle(rows, form.fold)


def unfold_rows(rows: Tensor, form: LatentForm) -> Tensor:
    """The inverse of `fold_rows`."""
    from torch.nn.functional import pixel_shuffle

    return rows if form.fold == 1 else pixel_shuffle(rows, form.fold)


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


def encoded(vae: Any, pixels: Tensor, form: LatentForm = PLAIN, *, frames: int = 1) -> Tensor:
    """Rows of pixels (b f, 3, H, W), the frames of a clip adjacent, to the moments of their
    latents (b f', 2c, h, w), folded: f' is f for a VAE of pictures, see `ClipFrames`."""
    from functools import partial

    from trainer.backbones.layout import clips_to_rows, rows_to_clips

    size = pixels.shape[-2] * pixels.shape[-1]
    if not form.frames(vae.config).in_time:
        return in_slices(vae, partial(folded_moments, vae, form=form), pixels, pixels=size)
    clips, step = rows_to_clips(pixels, frames), partial(posterior_moments, vae)
    moments = clips_to_rows(in_slices(vae, step, clips, pixels=size, frames=frames))
    return fold_rows(moments, form)


def decoded(vae: Any, latents: Tensor, form: LatentForm = PLAIN, *, frames: int = 1) -> Tensor:
    """What a denoiser gives, (b f', c, h, w) with `frames` latent frames in a clip, to pixels
    (b f, 3, H, W)."""
    from functools import partial

    from trainer.backbones.layout import clips_to_rows, rows_to_clips

    pixels, known = form.pixels(vae.config), form.frames(vae.config)
    assert pixels is not None, "the config of a VAE that was loaded names its levels"
    size = latents.shape[-2] * latents.shape[-1] * pixels**2
    if not known.in_time:
        return in_slices(vae, partial(decode_latents, vae, form=form), latents, pixels=size)

    def step(part: Tensor) -> Tensor:
        sample: Tensor = vae.decode(part, **_timed(vae, part)).sample
        return sample

    clips = rows_to_clips(unfold_rows(unscale_latents(vae, latents, form), form), frames)
    return clips_to_rows(in_slices(vae, step, clips, pixels=size, frames=known.shown(frames)))


def _timed(vae: Any, latents: Tensor) -> dict[str, Any]:
    """The timestep of a VAE whose decoder removes noise too: that of none, as in the stock pipeline
    of LTX-Video."""
    if not vae.config.get("timestep_conditioning"):
        return {}
    return {"temb": latents.new_zeros(len(latents))}
