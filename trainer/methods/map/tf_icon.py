"""TF-ICON: an object of a second picture is put into a first one, where a mask says, by
self-attention whose scores are composed of both.

    S = S_background outside the box, S_reference within the object, Q K_reference^T between

Lu, Liu and Kong, ICCV 2023, arXiv 2307.12493. Nothing trains. It needs `image=`, `reference=` and
`mask=` of `edit`: the reference is as large as the picture, with the object where it is to be.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Use
from trainer.methods.shared.editing import SourceEdit, Window
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class TFIcon(SourceEdit):
    """How long the scores are composed, and the background kept."""

    kind: ClassVar[EditKind] = "attention"
    use: ClassVar[Use] = "sample"
    systems: ClassVar[str] = "TF-ICON"
    paper: ClassVar[str] = "arXiv 2307.12493"

    sites: SiteSelector = Field("self", description=f"whose scores are composed: {SELECTOR}")
    steps: Window | None = Field((0.0, 0.4), description="the steps in which they are")
    background_until: float = Field(
        0.8, ge=0, le=1, description="share of the steps in which the background is kept"
    )
    exceptional: bool = Field(
        True, description="invert both under a text in which every token is the same"
    )
    bank_limit: float = Field(
        4096, gt=0, description="megabytes of queries and keys kept of the reference"
    )

    def idle(self) -> dict[str, str]:
        if self.steps is not None:
            return {}
        return dict.fromkeys(("sites", "bank_limit"), "steps=null composes no scores")

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.bank import FeatureBank
        from trainer.attention.sites import require
        from trainer.ops.tf_icon import ComposedAttention, Composition, exceptional

        told = Composition(
            self.name, self.sites, steps=self.steps, background_until=self.background_until
        )
        op = ComposedAttention(told, FeatureBank(limit=self.bank_limit))
        branch = {
            "replays": True,
            "inverts": True,
            "masks": ("source",),
            "refers": True,
            "tells": exceptional if self.exceptional else None,
        }
        functions = {"begin": op.start, "after_step": op.after_step, "shown": op.shown}
        sites = require(model.sites, self.sites, "sites")
        return self.edit_by(op, sites, branch=branch, **functions)
