"""MasaCtrl: a picture is edited in pose or place, while what it shows stays the same: the
self-attention of the edit looks at the source.

    O = softmax(Q K_source^T / sqrt(d)) V_source    from a layer and a step on

Cao et al., ICCV 2023, arXiv 2304.08465. Nothing trains. Its layers 10 of 16, and step 4 of 50, are
given as shares here, so that they hold for every backbone and number of steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Use
from trainer.methods.shared.editing import SourceEdit, Window
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class MasaCtrl(SourceEdit):
    """How much of the edit's self-attention is the source's."""

    kind: ClassVar[EditKind] = "attention"
    use: ClassVar[Use] = "sample"
    systems: ClassVar[str] = "MasaCtrl"
    paper: ClassVar[str] = "arXiv 2304.08465"

    share: Literal["mutual", "union", "mask", "mask-auto"] = Field(
        "mutual",
        description="what the edit looks at: mutual, the source alone; union, both; mask, the "
        "source's object inside the edit's and the rest outside, by mask= and target_mask= of "
        "`edit`; mask-auto, the same by the maps of words",
    )
    sites: SiteSelector = Field(
        "self & depth>=0.64 | joint & depth>=0.64",
        description=f"the self-attention that does: {SELECTOR}",
    )
    steps: Window = Field((0.08, 1.0), description="the steps in which it does")
    mask_words: tuple[str, ...] | None = Field(
        None, description="of mask-auto: whose maps make the masks; null for those that differ"
    )
    threshold: float = Field(0.1, gt=0, lt=1, description="likewise: of the maps from 0 to 1")
    mask_tokens: int = Field(16 * 16, gt=0, description="likewise: the largest grid of the maps")

    def idle(self) -> dict[str, str]:
        if self.share == "mask-auto":
            return {}
        why = f"share={self.share} makes no masks of maps; give share=mask-auto"
        return dict.fromkeys(("mask_words", "threshold", "mask_tokens"), why)

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.masactrl import MutualSelfAttention, Sharing

        told = Sharing(
            self.name,
            self.sites,
            share=self.share,
            steps=self.steps,
            words=self.mask_words,
            threshold=self.threshold,
            mask_tokens=self.mask_tokens,
        )
        op = MutualSelfAttention(told)
        sites = require(model.sites, self.sites, "sites")
        read = ("source", "target") if self.share == "mask" else ()
        return self.edit_by(op, sites, branch={"masks": read}, shown=op.shown)
