"""Tune-A-Video: an image model learns the motion of one clip, then generates that motion of other
things.

    o_i = softmax(q_i [k_0; k_(i-1)]^T / sqrt(d)) [v_0; v_(i-1)]    in self-attention, frame i
    x   <- x + W_o attention over the frames of each pixel          after the feed-forward

Wu et al., ICCV 2023, arXiv 2212.11565, section 3.2. The paper trains this temporal attention and
the queries of all other attention: add `selective` with `sites=all projections=[q]`, as
`recipe=tune_a_video` does. W_o and its bias start at zero; the released code zeroes the weight
alone, and freezes the norm before it, which trains here.

Before training, a clip is what the image model generates when its frames read each other; an image
is what the image model generates alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.aligned import Inflated

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class TuneAVideo(Inflated):
    """Which attention is inflated, and who trains it."""

    kind: ClassVar[EditKind] = "structure"
    systems: ClassVar[str] = "Tune-A-Video"
    paper: ClassVar[str] = "arXiv 2212.11565"

    def apply(self, model: AttentionModel) -> Edit:
        return self.inflated(model, ("first", "previous"))
