"""How pictures and clips are sampled: one record of settings for previews, `sample`, `evaluate` and
class images."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.diffusion.guidance import COND, UNCOND


@dataclass(frozen=True)
class Sampling:
    """How pictures or clips are sampled.

    guidance: the scale of classifier-free guidance; 1 or less runs without the unconditional rows.
    negative: the prompt of those rows. size: height and width in pixels, multiples of the
    backbone's divisor; None for the size it was trained at. frames: of a clip as a
    player shows it, 1 for pictures; latents may have fewer, see `ClipFrames`. fps: frames a second, for a model that has learned of them. temporal_guidance: of clips, see
    `guidance.temporal`. sampler: one of `backbones.solvers.SOLVERS`, None for the backbone's own.

    Raises:
        ValueError: no step, no frame, or temporal guidance without guidance or without frames.
    """

    steps: int = 25
    guidance: float = 5.0
    negative: str = ""
    size: tuple[int, int] | None = None
    frames: int = 1
    fps: float | None = None
    temporal_guidance: float = 1.0
    sampler: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: give at least 1")
        if self.frames < 1:
            raise ValueError(f"frames={self.frames}: give 1 for pictures, or more for clips")
        if self.temporal_guidance != 1 and (self.frames == 1 or not self.guided):
            raise ValueError(
                f"temporal_guidance={self.temporal_guidance:g} is for clips that are guided; give "
                "frames and a guidance above 1"
            )

    @property
    def guided(self) -> bool:
        return self.guidance > 1

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of rows of one call of the denoiser."""
        return (UNCOND, COND) if self.guided else (COND,)
