"""GaussCtrl's attention: several views, or pictures, that are made at once look alike, since each
also looks at reference views.

    O = w Attn(Q, K, V) + (1 - w) mean_r Attn(Q, K_r, V_r)

Wu et al., ECCV 2024, arXiv 2403.08733: the form of its attention alone, without depth control and
the scene of splats. Nothing trains. The first pictures of a batch are the references.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Method, Use
from trainer.methods.shared.editing import Window
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel

ASPECT = "the reference views"


class GaussCtrl(Method):
    """How much a picture looks at the references."""

    kind: ClassVar[EditKind] = "attention"
    use: ClassVar[Use] = "sample"
    systems: ClassVar[str] = "GaussCtrl (attention)"
    paper: ClassVar[str] = "arXiv 2403.08733"

    own: float = Field(0.6, ge=0, le=1, description="share of a picture's own attention, 1 for all")
    references: int = Field(4, gt=0, description="how many of the first pictures are looked at")
    sites: SiteSelector = Field("self", description=f"the attention that looks: {SELECTOR}")
    steps: Window = Field((0.0, 1.0), description="the steps in which it does")

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.editing.installed import editing_hook
        from trainer.ops.gaussctrl import AlignedViews, Alignment

        told = Alignment(
            self.name, self.sites, own=self.own, references=self.references, steps=self.steps
        )
        hook = editing_hook(self.name, AlignedViews(told), None)
        sites = require(model.sites, self.sites, "sites")
        names = tuple(site.name for site in sites)
        claims = tuple((f"{model.denoiser_name}.{name}", ASPECT) for name in names)
        return Edit(names, claims=claims, sampling=(hook,))
