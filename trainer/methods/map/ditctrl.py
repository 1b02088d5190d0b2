"""DiTCtrl: edits in transformers whose text and image share one sequence, with the keys and values
of the source in late layers, inside masks of words, and with weights of words.

    O = Attn(Q, K_source, V_source);  O = M O_f + (1 - M) O_b;  A <- A w

Cai et al., CVPR 2025, arXiv 2412.18597, for pictures: its videos of several prompts are not built.
Nothing trains. The released code shares in layers 25 to 30 of 30 and steps 2 to 25 of 50.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Use
from trainer.methods.shared.editing import SourceEdit, Window
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class DiTCtrl(SourceEdit):
    """What is shared, inside which masks, and how much words weigh."""

    kind: ClassVar[EditKind] = "attention"
    use: ClassVar[Use] = "sample"
    systems: ClassVar[str] = "DiTCtrl"
    paper: ClassVar[str] = "arXiv 2412.18597"

    sites: SiteSelector = Field(
        "joint & depth>=0.83 | self & depth>=0.83",
        description=f"the attention whose keys and values are the source's: {SELECTOR}",
    )
    steps: Window = Field((0.04, 0.5), description="the steps in which they are")
    mask_words: tuple[str, ...] | None = Field(
        None,
        description="at joint attention: words inside whose maps the edit looks at the source's, "
        "and outside at the rest; null for no masks",
    )
    word_weights: dict[str, float] = Field(
        {}, description="at joint attention: factors on the maps of words, as in {red: 2}"
    )
    threshold: float = Field(0.3, gt=0, lt=1, description="of mask_words: of the maps from 0 to 1")
    mask_tokens: int = Field(64 * 64, gt=0, description="likewise: the largest grid of the maps")

    def idle(self) -> dict[str, str]:
        if self.mask_words is not None:
            return {}
        return dict.fromkeys(("threshold", "mask_tokens"), "mask_words=null makes no masks")

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.ditctrl import JointControl, JointSharing

        told = JointSharing(
            self.name,
            self.sites,
            steps=self.steps,
            words=self.mask_words,
            weights=self.word_weights,
            threshold=self.threshold,
            tokens=self.mask_tokens,
        )
        op = JointControl(told)
        sites = require(model.sites, self.sites, "sites")
        return self.edit_by(op, sites, branch={}, shown=op.shown)
