"""InFusion, on pictures: an edit with the source's features, moved by the difference that the
prompts make, in which the edited concept alone is put into the source.

    f <- f_source + strength (f - f_source);  K, V <- K_source, V_source;  x <- x_source outside M

arXiv 2308.00135. Nothing trains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Use
from trainer.methods.shared.editing import SourceEdit, Window
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class InFusion(SourceEdit):
    """How much of the source the features have, and what is fused."""

    kind: ClassVar[EditKind] = "attention"
    use: ClassVar[Use] = "sample"
    systems: ClassVar[str] = "InFusion"
    paper: ClassVar[str] = "arXiv 2308.00135"

    features: SiteSelector = Field(
        "up", description="the residual blocks of a U-Net whose features are injected"
    )
    feature_steps: Window | None = Field(
        (0.0, 0.5), description="the steps in which they are; null for none, as transformers need"
    )
    strength: float = Field(
        0.8, ge=0, le=1, description="of the prompts' difference: 0 is the source, 1 the edit alone"
    )
    sites: SiteSelector = Field(
        "self & depth>=0.64", description=f"whose keys and values are the source's: {SELECTOR}"
    )
    steps: Window | None = Field((0.0, 0.5), description="the steps in which they are")
    fuse: bool | tuple[str, ...] = Field(
        True,
        description="the words outside of which the source stays; true for those that differ, "
        "false to keep none of it",
    )
    threshold: float = Field(0.3, gt=0, lt=1, description="of their maps, as a share of the most")
    fuse_from: float = Field(0.2, ge=0, lt=1, description="share of the steps before it is fused")
    mask_tokens: int = Field(16 * 16, gt=0, description="the largest grid of the maps")

    def idle(self) -> dict[str, str]:
        found = {}
        if self.feature_steps is None:
            found = dict.fromkeys(("features", "strength"), "feature_steps=null injects none")
        if self.steps is None:
            found["sites"] = "steps=null leaves them the edit's own"
        if not self.fuse:
            names = ("threshold", "fuse_from", "mask_tokens")
            found |= dict.fromkeys(names, "fuse=false makes no mask")
        return found

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.infusion import Fusion, InFusionEditor

        told = Fusion(
            self.name,
            self.sites,
            steps=self.steps,
            features=self.features,
            feature_steps=self.feature_steps,
            strength=self.strength,
            words=self.fuse or False,
            threshold=self.threshold,
            fuse_from=self.fuse_from,
            mask_tokens=self.mask_tokens,
        )
        editor = InFusionEditor(told)
        sites = require(model.sites, self.sites, "sites")
        functions = {"after_step": editor.after_step, "shown": editor.shown}
        return self.edit_by(editor, sites, branch={}, **functions)
