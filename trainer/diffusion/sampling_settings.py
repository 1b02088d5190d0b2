"""How pictures and clips are sampled: one record of settings for previews, `sample`, `evaluate` and
class images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainer.diffusion.blocks import RECONSTRUCTION, Blocks
from trainer.diffusion.guidance import COND, GIVEN, UNCOND

if TYPE_CHECKING:
    from trainer.attention.condition import Condition


@dataclass(frozen=True)
class Sampling:
    """How pictures or clips are sampled.

    guidance: the scale of classifier-free guidance; 1 or less runs without the unconditional rows.
    Of a backbone that has the scale as an input of its network (`embeds`, see `on`), that input,
    and no rows are unconditional; there, true_guidance is the scale of classifier-free guidance
    beside it, as `true_cfg_scale` of diffusers. negative: the prompt of the unconditional rows.
    size: height and width in pixels, multiples of the backbone's divisor; None for the size it was
    trained at. frames: of a clip as a player shows it, 1 for pictures; latents may have fewer, see
    `ClipFrames`. blocks: of a clip of more frames than the model makes at once. reconstruction: the
    weight of the guidance by what is known of a clip, see `reconstruction.py`; 0 only replaces it.
    corrector: Langevin steps at each noise level of such clips. fps: frames a second, for a model
    that has learned of them. temporal_guidance: of clips, see `guidance.temporal`. sampler: one of
    `backbones.solvers.SOLVERS`, None for the backbone's own.
    condition_guidance: the scale of the conditions beside the text, as of reference pictures, which
    `guidance` then does not scale, see `guidance.classifier_free`; None scales all by `guidance`.

    Raises:
        ValueError: no step, no frame, blocks that are not smaller than the clip, or temporal
        guidance without guidance or without frames.
    """

    steps: int = 25
    guidance: float = 5.0
    negative: str = ""
    size: tuple[int, int] | None = None
    frames: int = 1
    fps: float | None = None
    temporal_guidance: float = 1.0
    sampler: str | None = None
    true_guidance: float = 1.0
    embeds: bool = False
    blocks: Blocks | None = None
    reconstruction: float = RECONSTRUCTION
    corrector: int = 0
    condition_guidance: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: give at least 1")
        if self.frames < 1:
            raise ValueError(f"frames={self.frames}: give 1 for pictures, or more for clips")
        if self.blocks is not None and self.frames <= self.blocks.size:
            raise ValueError(
                f"block={self.blocks.size} is for clips of more frames, and frames={self.frames}; "
                "give more frames, or leave block out"
            )
        if self.temporal_guidance != 1 and (self.frames == 1 or not self.guided):
            raise ValueError(
                f"temporal_guidance={self.temporal_guidance:g} is for clips that are guided; give "
                "frames and a guidance above 1"
            )
        if self.condition_guidance is not None and not self.guided:
            raise ValueError(
                f"condition_guidance={self.condition_guidance:g} is beside the guidance by the "
                "text; give guidance above 1 too"
            )

    def on(self, *, embeds: bool) -> Sampling:
        """The settings for a backbone. embeds: whether the scale of guidance is an input of its
        network.

        Raises:
            ValueError: a true_guidance for a backbone that has no other guidance, or a negative
            prompt that nothing would read.
        """
        if not embeds and self.true_guidance != 1:
            raise ValueError(
                f"true_guidance={self.true_guidance:g} is for backbones that have guidance as an "
                "input of their network; this one has none, so give guidance"
            )
        chosen = replace(self, embeds=embeds)
        if self.negative and not chosen.guided:
            why = (
                "this backbone has guidance as an input of its network; give true_guidance above "
                "1, which takes twice the time"
                if embeds
                else f"guidance={self.guidance:g} does not guide; give more than 1"
            )
            raise ValueError(
                f"negative={self.negative!r} would not be read: {why}, or leave negative out"
            )
        return chosen

    def told(self, condition: Condition) -> Condition:
        """A condition with the scale of guidance, where the network has that as an input."""
        tokens = condition.tokens
        if not self.embeds or tokens is None:
            return condition
        return replace(condition, guidance=tokens.new_full((len(tokens),), self.guidance))

    @property
    def cfg_scale(self) -> float:
        """The scale of classifier-free guidance."""
        return self.true_guidance if self.embeds else self.guidance

    @property
    def guided(self) -> bool:
        return self.cfg_scale > 1

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of rows of one call of the denoiser."""
        if not self.guided:
            return (COND,)
        return (UNCOND, COND) if self.condition_guidance is None else (UNCOND, GIVEN, COND)
