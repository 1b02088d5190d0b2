"""How a denoiser takes clips. Samplers and losses have a row of a batch for every frame, and every
text and timestep once a row; a denoiser of video has the frames as an axis of its own."""

from __future__ import annotations

from torch import Tensor


def rows_to_clips(x: Tensor, frames: int) -> Tensor:
    """Rows (b f, c, h, w), the frames of a clip adjacent, to clips (b, c, f, h, w).

    Raises:
        ValueError: the rows do not divide into clips.
    """
    if len(x) % frames:
        raise ValueError(
            f"clips of {frames} frames, and a batch of {len(x)} rows does not divide into them; "
            "give every frame of a clip a row"
        )
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


def clips_to_rows(x: Tensor) -> Tensor:
    """Clips (b, c, f, h, w) to rows (b f, c, h, w)."""
    return x.transpose(1, 2).flatten(0, 1)
