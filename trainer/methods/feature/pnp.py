"""Plug-and-Play: a picture is edited by its prompt while its layout stays, by the self-attention
maps and residual features of the source.

    A = A_source in the decoder's self-attention,  f = f_source in one residual block

Tumanyan et al., CVPR 2023, arXiv 2211.12572. Nothing trains. A real picture is inverted, and its
rows are the latents of that inversion at every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Use
from trainer.methods.shared.editing import SourceEdit, Window
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class PnP(SourceEdit):
    """How long the edit has the maps and the features of the source."""

    kind: ClassVar[EditKind] = "attention"
    use: ClassVar[Use] = "sample"
    systems: ClassVar[str] = "Plug-and-Play (PnP)"
    paper: ClassVar[str] = "arXiv 2211.12572"

    sites: SiteSelector = Field(
        "self & depth>=0.51 | joint & depth>=0.51",
        description=f"the self-attention whose queries and keys are the source's: {SELECTOR}",
    )
    steps: Window | None = Field((0.0, 0.5), description="the steps in which they are")
    features: SiteSelector = Field(
        "name:up_blocks.1.resnets.1",
        description="the residual blocks of a U-Net whose features are the source's, by a selector",
    )
    feature_steps: Window | None = Field(
        (0.0, 0.8),
        description="the steps in which they are; null for none, as transformers need it",
    )

    def idle(self) -> dict[str, str]:
        why = "leaves them the edit's own"
        found = {} if self.steps else {"sites": f"steps=null {why}"}
        return found if self.feature_steps else found | {"features": f"feature_steps=null {why}"}

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.pnp import Injection, PlugAndPlay

        told = Injection(
            self.name,
            self.sites,
            steps=self.steps,
            features=self.features,
            feature_steps=self.feature_steps,
        )
        sites = require(model.sites, self.sites, "sites")
        return self.edit_by(PlugAndPlay(told), sites, branch={"replays": True})
