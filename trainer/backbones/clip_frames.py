"""How many latent frames a clip has, as a family declares it of its VAE. Importing this imports no
torch.

A causal VAE of video makes one latent frame of the first frame, and one more of every `per_latent`
frames after it:

    1 + k * per_latent  frames of pixels  <->  1 + k  frames of latents
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClipFrames:
    """per_latent: frames of pixels per latent frame after the first; 1 for a VAE of pictures, which
    knows no time. step: a clip has one frame and a multiple of `step` more; 0 where that is
    `per_latent`."""

    per_latent: int = 1
    step: int = 0

    @property
    def in_time(self) -> bool:
        """Whether latents hold several frames."""
        return self.per_latent > 1

    def latent(self, frames: int, key: str = "frames") -> int:
        """The latent frames of a clip of so many frames. key: names their number in errors.

        Raises:
            ValueError: the VAE does not give a clip of that many frames back.
        """
        self.check(frames, key)
        return (frames - 1) // self.per_latent + 1

    def shown(self, latent_frames: int) -> int:
        """The frames of a clip of so many latent frames."""
        return (latent_frames - 1) * self.per_latent + 1

    def check(self, frames: int, key: str = "frames") -> None:
        """Raises ValueError unless a clip may have so many frames. key: names their number."""
        step = self.step or self.per_latent
        if (frames - 1) % step == 0:
            return
        below = (frames - 1) // step * step + 1
        raise ValueError(
            f"{key}={frames}: this backbone takes clips of a multiple of {step} frames and one "
            f"more; give {below} or {below + step}"
        )
