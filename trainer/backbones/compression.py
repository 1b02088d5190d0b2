"""How much smaller latents are than pixels, along an edge and in time, as the config of a VAE says.
Importing this imports no torch.

A causal VAE of video makes one latent frame of the first frame, and one more of every `frames`
frames after it:

    1 + k * frames  frames of pixels  <->  1 + k  frames of latents
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Compression:
    """pixels: along an edge per latent. frames: of pixels per latent frame after the first; 1 for a
    VAE of images, which knows no time. step: a clip has one frame and a multiple of `step` more; 0
    where that is `frames`."""

    pixels: int
    frames: int = 1
    step: int = 0

    @property
    def in_time(self) -> bool:
        """Whether the VAE takes clips (b, 3, f, H, W), and not pictures alone."""
        return self.frames > 1

    def latent_frames(self, frames: int, key: str = "frames") -> int:
        """The latent frames of a clip of so many frames. key: names their number in errors.

        Raises:
            ValueError: the VAE does not give a clip of that many frames back.
        """
        check_frames(key, frames, self)
        return (frames - 1) // self.frames + 1

    def frames_of(self, latent_frames: int) -> int:
        """The frames of a clip of so many latent frames."""
        return (latent_frames - 1) * self.frames + 1


def check_frames(key: str, frames: int, compression: Compression) -> None:
    """Raises ValueError unless a clip may have so many frames. key: names their number."""
    step = compression.step or compression.frames
    if (frames - 1) % step == 0:
        return
    below = (frames - 1) // step * step + 1
    raise ValueError(
        f"{key}={frames}: this backbone takes clips of a multiple of {step} frames and one more; "
        f"give {below} or {below + step}"
    )


def compression_of(kind: str, config: Mapping[str, Any]) -> Compression | None:
    """The compression of a VAE of a class of diffusers, by its config; None where that does not
    say."""
    if kind in OF_CLIPS:
        return OF_CLIPS[kind](config)
    widths = config.get("encoder_block_out_channels") or config.get("block_out_channels")
    if not isinstance(widths, (list, tuple)):
        return None
    return Compression(2 ** (len(widths) - 1))


def _of_wan(config: Mapping[str, Any]) -> Compression:
    pixels, frames = config.get("scale_factor_spatial"), config.get("scale_factor_temporal")
    return Compression(int(pixels or 8), frames=int(frames or 4))


def _of_cogvideox(config: Mapping[str, Any]) -> Compression:
    """Its decoder makes one frame of the first latent frame only where their number is odd."""
    frames = int(config.get("temporal_compression_ratio") or 4)
    pixels = 2 ** (len(config.get("block_out_channels") or (0,) * 4) - 1)
    return Compression(pixels, frames=frames, step=2 * frames)


def _of_ltx(config: Mapping[str, Any]) -> Compression:
    halved = 2 ** sum(config.get("spatio_temporal_scaling") or (True, True, True, False))
    pixels = config.get("spatial_compression_ratio") or config.get("patch_size", 4) * halved
    frames = config.get("temporal_compression_ratio") or config.get("patch_size_t", 1) * halved
    return Compression(int(pixels), frames=int(frames))


OF_CLIPS: Mapping[str, Callable[[Mapping[str, Any]], Compression]] = {
    "AutoencoderKLWan": _of_wan,
    "AutoencoderKLCogVideoX": _of_cogvideox,
    "AutoencoderKLLTXVideo": _of_ltx,
}
