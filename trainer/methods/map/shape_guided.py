"""Shape-Guided Diffusion: an object is replaced by another of the same shape, given as a mask, by
attention that does not cross its border.

    A <- A m at words inside, A (1 - m) at words outside;  A <- A ((io - 1) s + 1) among tokens

Park et al., arXiv 2212.00210. Nothing trains. It needs `mask=` of `edit`, of a real picture or of
one that is generated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Use
from trainer.methods.shared.editing import SourceEdit
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class ShapeGuided(SourceEdit):
    """Which words are inside the mask, and how strictly tokens keep to their side."""

    kind: ClassVar[EditKind] = "attention"
    use: ClassVar[Use] = "sample"
    systems: ClassVar[str] = "Shape-Guided Diffusion"
    paper: ClassVar[str] = "arXiv 2212.00210"

    sites: SiteSelector = Field(
        "self | cross", description=f"the attention that keeps to its side: {SELECTOR}"
    )
    inside: tuple[str, ...] | None = Field(
        None, description="the words of the object; null for those that differ from the source's"
    )
    schedule: Literal["exp", "linear", "cosine", "constant"] = Field(
        "exp", description="how self-attention is let across the border with the steps"
    )
    background: bool = Field(True, description="keep the source outside the mask")

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.shape_guided import InsideOutside, InsideOutsideAttention

        told = InsideOutside(
            self.name,
            self.sites,
            schedule=self.schedule,
            words=self.inside,
            background=self.background,
        )
        op = InsideOutsideAttention(told)
        sites = require(model.sites, self.sites, "sites")
        branch = {"replays": True, "masks": ("source",)}
        return self.edit_by(op, sites, branch=branch, after_step=op.after_step)
