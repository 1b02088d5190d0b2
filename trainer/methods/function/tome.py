"""ToMe for diffusion: attention on merged tokens; those that are most alike are averaged before a
layer, and each gets a copy of its output.

    y = unmerge(attention(merge(x)))

Bolya and Hoffman, arXiv 2303.17604; Bolya et al., arXiv 2210.09461, for proportional attention. One
random token of every cell stays, drawn anew at every step, and the `ratio` of all tokens that are
most similar to one of those by cosine are merged into it. The authors compare the inputs of a
block, here the inputs of the layer, which are normed; where a layer gives tokens positions by their
number, queries, keys and values are merged inside it and the keys compared. It trains nothing:

    python -m trainer sample backbone=tiny 'methods.tome={ratio: 0.5}' prompt="a fox"
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.merging import MergingMethod

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Tome(MergingMethod):
    """How many tokens are merged, and where."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "ToMe, ToMe for diffusion (ToMeSD)"
    paper: ClassVar[str] = "arXiv 2303.17604, 2210.09461"

    cell: int = Field(2, gt=1, description="one random token in cell x cell always stays")
    seed: int = Field(0, ge=0, description="of the random tokens that stay")

    @model_validator(mode="after")
    def _leaves_the_targets(self) -> Tome:
        most = 1 - 1 / self.cell**2
        if self.ratio > most:
            raise ValueError(
                f"ratio={self.ratio:g} merges more than there is: one token of each cell of "
                f"{self.cell} x {self.cell} stays, so give at most {most:g}, or a larger cell"
            )
        return self

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.ops.reduction.tome import Bipartite

        return self.merged(model, Bipartite(self.ratio, self.cell, self.seed))
