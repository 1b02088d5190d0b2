"""Clips that are longer than the model's own, made block after block: each block goes on from the
last frames of the one before (Video diffusion models, arXiv 2204.03458, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

RECONSTRUCTION = 2.0  # the weight of the guidance by what is known of a clip


@dataclass(frozen=True)
class Blocks:
    """size: frames that the model makes at once. overlap: the first of them, which are the last of
    the block before and are known.

    Raises:
        ValueError: a block that adds no frame, or knows none of those before it.
    """

    size: int
    overlap: int

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(
                f"block={self.size}: give at least 2, one frame to go on from and a new one"
            )
        if not 0 < self.overlap < self.size:
            raise ValueError(
                f"overlap={self.overlap}: blocks of {self.size} frames have 1 to {self.size - 1} "
                "frames in common with the one before"
            )

    @classmethod
    def of(cls, size: int, overlap: int | None = None) -> Blocks:
        """With half of a block in common where no overlap is given."""
        return cls(size, max(1, size // 2) if overlap is None else overlap)

    def spans(self, frames: int) -> list[range]:
        """The frames of each block, all of the same size. The last one ends with the clip, and has
        more frames in common with the one before where that is needed."""
        step = self.size - self.overlap
        starts = [*range(0, frames - self.size, step), frames - self.size]
        return [range(start, start + self.size) for start in starts]
