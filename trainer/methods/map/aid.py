"""AID: pictures between two others, smooth and each in itself consistent, by attention that looks
at both ends.

    O = (1 - t) Attn(Q, [K_1; K], [V_1; V]) + t Attn(Q, [K_m; K], [V_m; V])    (outer, fused)

He et al., arXiv 2403.17924. Nothing trains. The first and the last prompt of a sampling are the
ends, those between are made on the way: `edit` with two prompts and between=5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Method, Use
from trainer.methods.shared.editing import Window
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class AID(Method):
    """How attention looks at both ends, and how pictures are spread between them."""

    kind: ClassVar[EditKind] = "attention"
    use: ClassVar[Use] = "sample"
    systems: ClassVar[str] = "AID (Attention Interpolation)"
    paper: ClassVar[str] = "arXiv 2403.17924"

    way: Literal["inner", "outer"] = Field(
        "outer",
        description="inner interpolates keys and values, outer what attention makes of each end's",
    )
    fused: bool = Field(True, description="look at a picture's own keys beside those of the ends")
    sites: SiteSelector = Field("self | cross", description=f"the attention that does: {SELECTOR}")
    steps: Window | None = Field(
        (0.0, 0.5),
        description="the steps in which it does; null for none, which leaves noise and text alone "
        "interpolated",
    )
    concentration: float = Field(
        1.0,
        gt=0,
        le=100,
        description="of the Beta prior of the shares; 1 for equal distances, more for more of them "
        "in the middle",
    )

    def idle(self) -> dict[str, str]:
        if self.steps is not None:
            return {}
        return dict.fromkeys(("way", "fused", "sites"), "steps=null looks at no end")

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.aid import InterpolatedAttention, Interpolation
        from trainer.ops.editing.installed import editing_hook

        told = Interpolation(
            self.name,
            self.sites,
            way=self.way,
            fused=self.fused,
            steps=self.steps,
            concentration=self.concentration,
        )
        op = InterpolatedAttention(told)
        hook = editing_hook(self.name, op, None, begin=op.start, tells=op.tells, between=True)
        sites = require(model.sites, self.sites, "sites")
        return Edit(tuple(site.name for site in sites), sampling=(hook,))
