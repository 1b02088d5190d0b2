"""ToMA: attention on merged tokens; merging and its inverse are matrix products in tiles.

    y = A^T attention(A x / sum(A))    A = softmax(sharpness * cos(x_chosen, x)) over the chosen

Lu et al., arXiv 2509.10918. In every tile the tokens that stand for the others are chosen greedily
by facility location, and serve for some steps. The paper's code chooses them from the first picture
of a batch for all; here each picture has its own, and is the same beside any others. It trains
nothing:

    python -m trainer sample backbone=tiny 'methods.toma={ratio: 0.5}' prompt="a fox"
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.merging import MergingMethod

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Toma(MergingMethod):
    """How many tokens are merged, and where."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "ToMA"
    paper: ClassVar[str] = "arXiv 2509.10918"

    tile: int = Field(
        8, gt=1, description="tokens along the edge of a tile, inside which they are merged"
    )
    sharpness: float = Field(
        1000.0, gt=0, description="factor on the cosines; larger gives each token to one other"
    )
    choose_every: int = Field(
        10, gt=0, description="steps of a sampler for which the chosen tokens serve"
    )
    share_every: int = Field(5, gt=0, description="steps for which the shares A serve")

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.hooks import SamplingHook
        from trainer.ops.reduction.toma import Facilities

        planner = Facilities(
            self.ratio,
            self.tile,
            self.sharpness,
            choose_every=self.choose_every,
            share_every=self.share_every,
        )
        forget = SamplingHook(open=planner.forget, close=planner.forget)
        return replace(self.merged(model, planner), sampling=(forget,))
