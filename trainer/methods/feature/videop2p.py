"""Video-P2P: Tune-A-Video whose frames read the first frame alone, so that an edit of the first
frame appears in all.

    o_i = softmax(q_i k_0^T / sqrt(d)) v_0    in self-attention, frame i

Liu et al., arXiv 2303.04761, section 3.1: the model that its editing is built on. Train the queries
beside it, as in `tune_a_video`: `selective` with `sites=all projections=[q]`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.aligned import Inflated

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class VideoP2P(Inflated):
    """Which attention is inflated, and who trains it."""

    kind: ClassVar[EditKind] = "structure"
    systems: ClassVar[str] = "Video-P2P"
    paper: ClassVar[str] = "arXiv 2303.04761"

    def apply(self, model: AttentionModel) -> Edit:
        return self.inflated(model, ("first",))
