"""FAM diffusion: pictures twice as large as a model was trained at, in the layout of one at that
size, by modulating frequencies and attention.

    z <- F^-1[K F(z) + (1 - K) F(z_native)],   A <- (1 - w) A + w up(A_native)

Yang et al., arXiv 2411.18552. Nothing trains. The size asked for is `factor` times the native one:
`edit recipe=fam_diffusion size=128` with a backbone of 64 pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Method, Use
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class FAMDiffusion(Method):
    """How much of the native picture a larger one has."""

    kind: ClassVar[EditKind] = "attention"
    use: ClassVar[Use] = "sample"
    systems: ClassVar[str] = "FAM diffusion"
    paper: ClassVar[str] = "arXiv 2411.18552"

    factor: int = Field(2, ge=2, le=8, description="how many times larger than the native size")
    weight: float = Field(
        0.5,
        ge=0,
        le=1,
        description="of the native picture's maps; 0 for its layout alone",
    )
    low_pass: float = Field(
        0.5, ge=0, le=1, description="share of frequencies that count as layout; 0 for none"
    )
    sites: SiteSelector = Field(
        "self & up & /4", description=f"the self-attention that is modulated: {SELECTOR}"
    )
    bank_limit: float = Field(4096, gt=0, description="megabytes of native maps that are kept")

    def idle(self) -> dict[str, str]:
        if self.weight:
            return {}
        return dict.fromkeys(("sites", "bank_limit"), "weight=0 reads no native maps")

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.bank import FeatureBank
        from trainer.attention.sites import require
        from trainer.ops.editing.installed import editing_hook
        from trainer.ops.fam_diffusion import Enlargement, Modulation

        told = Enlargement(
            self.name,
            self.sites,
            factor=self.factor,
            weight=self.weight,
            low_pass=self.low_pass,
        )
        op = Modulation(told, FeatureBank(limit=self.bank_limit))
        hook = editing_hook(self.name, op, None, begin=op.start, after_step=op.after_step)
        sites = require(model.sites, self.sites, "sites")
        return Edit(tuple(site.name for site in sites), sampling=(hook,))
