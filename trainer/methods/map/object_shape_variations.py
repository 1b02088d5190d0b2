"""Object-level shape variations: one object of a picture in other shapes, by words that stand for
it in some steps, while the rest of the picture stays.

    V = W_v c_proxy in a window of steps, K = W_k c_source;  A = A_source at tokens of kept objects

Patashnik et al., ICCV 2023, arXiv 2303.11306 (Local Prompt Mixing). Nothing trains. The prompt is
that of the source with another word for the object, several prompts are several shapes; the picture
shows what the source says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Use
from trainer.methods.shared.editing import SourceEdit, Window

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class ObjectShapeVariations(SourceEdit):
    """When the proxy word is told, and what stays."""

    kind: ClassVar[EditKind] = "attention"
    use: ClassVar[Use] = "sample"
    systems: ClassVar[str] = "Localizing Object-level Shape Variations (Local Prompt Mixing)"
    paper: ClassVar[str] = "arXiv 2303.11306"

    mix_steps: Window | None = Field(
        (0.14, 0.34),
        description="steps in which the values of cross-attention are those of the prompt; in all "
        "others the source's text is told",
    )
    keep_steps: Window | None = Field(
        (0.0, 0.8), description="steps in which kept objects have the source's self-attention"
    )
    keep_tokens: int = Field(32 * 32, gt=0, description="of the sites with no more tokens")
    keep_words: tuple[str, ...] | None = Field(
        None, description="the objects that stay; null for all but the words that differ"
    )
    keep_threshold: float = Field(
        0.05, gt=0, lt=1, description="of the attention to a word, above which a token is of it"
    )
    background_at: float | None = Field(
        0.7,
        ge=0,
        lt=1,
        description="the share of the steps after which the source's background is put in; null "
        "for never",
    )
    segments: int = Field(5, gt=0, description="of the background: clusters of self-attention")
    segment_threshold: float = Field(
        0.3, gt=0, lt=1, description="likewise: share of a word above which a cluster is none of it"
    )

    def idle(self) -> dict[str, str]:
        found = {}
        if self.keep_steps is None:
            found = dict.fromkeys(("keep_words", "keep_threshold"), "keep_steps=null keeps none")
        if self.background_at is None:
            why = "background_at=null puts no background in"
            found |= dict.fromkeys(("segments", "segment_threshold"), why)
        return found

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.object_shape_variations import ShapeVariation, Variation

        told = Variation(
            self.name,
            mix_steps=self.mix_steps,
            keep_steps=self.keep_steps,
            tokens=self.keep_tokens,
            keep_words=self.keep_words,
            keep_threshold=self.keep_threshold,
            background_at=self.background_at,
            segments=self.segments,
            segment_threshold=self.segment_threshold,
        )
        op = ShapeVariation(told)
        sites = require(model.sites, "self | cross", "sites")
        return self.edit_by(op, sites, branch={}, after_step=op.after_step, shown=op.shown)
