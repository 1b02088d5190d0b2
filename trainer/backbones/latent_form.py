"""How the latents that a denoiser is trained on come from those of its VAE, as a family declares.
Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.backbones.clip_frames import ClipFrames

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = "encoder_block_out_channels"  # what AutoencoderDC calls block_out_channels
COLOURS = 3  # channels of latents that are pixels
VAES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AsymmetricAutoencoderKL")


def halvings(config: Mapping[str, Any]) -> int | None:
    """How often a VAE halves a picture, from the widths of its levels; None where its config does
    not say."""
    widths = config.get(WIDTHS) or config.get("block_out_channels")
    return len(widths) - 1 if isinstance(widths, (list, tuple)) else None


def no_halving(config: Mapping[str, Any]) -> int:
    """Of pixels, which are what they are."""
    return 0


def of_pictures(config: Mapping[str, Any]) -> ClipFrames:
    """Of a VAE that knows no time."""
    return ClipFrames()


def channel_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (c,) of the latents of a VAE whose config lists them."""
    import torch

    config = vae.config
    return torch.tensor(config.latents_mean), torch.tensor(config.latents_std)


@dataclass(frozen=True)
class LatentForm:
    """From the latents z of a VAE to those of the denoiser, x0:

        x0 = (fold(z) - mean) / std           of each channel, or
        x0 = (fold(z) - shift_factor) * scaling_factor

    vaes: the classes of VAE that a family takes, none for one whose denoiser works on the pixels
    themselves: x0 is then the picture, and its folders have no part `vae`. fold: latents of the VAE
    along an edge that are one of the denoiser's, their values in its channels, in the order of
    `pixel_unshuffle`.
    statistics: (vae) -> mean and std (c,) of the channels after folding; None for the two numbers
    of the VAE's config. halvings: (config of the VAE) -> how often it halves a picture. clips:
    whether the VAE takes clips (b, 3, f, H, W), so that a picture is a clip of one frame. frames:
    (config of the VAE) -> how many latent frames a clip has, where latents hold several frames.
    """

    vaes: tuple[str, ...] = VAES
    fold: int = 1
    statistics: Callable[[Any], tuple[Tensor, Tensor]] | None = None
    halvings: Callable[[Mapping[str, Any]], int | None] = halvings
    clips: bool = False
    frames: Callable[[Mapping[str, Any]], ClipFrames] = of_pictures

    def pixels(self, config: Mapping[str, Any]) -> int | None:
        """Pixels along an edge of one of the denoiser's latents; None where the VAE's config does
        not say."""
        times = self.halvings(config)
        return None if times is None else int(2**times) * self.fold


PIXELS = LatentForm(vaes=(), halvings=no_halving)  # of a family without a VAE
