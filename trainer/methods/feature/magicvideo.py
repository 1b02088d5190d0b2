"""MagicVideo: an adaptor for each frame after every convolution, and directed attention over frames
beside the spatial attention.

    z_i <- (1 + s_i) z_i + b_i    for frame i, channel by channel
    z <- S-Attn(z) + W_o (softmax(q k^T / sqrt(d)) (.) M) v,  M_ij = 1 for j <= i, else 0

Zhou et al., arXiv 2211.11018, section 3.2. M acts after the softmax: no value of a later frame is
added, but its score is part of the softmax's sum. With `renormalise` M acts before it, and frame i
does not depend on later ones, as in causal attention elsewhere. s, b and W_o start at zero, so
training starts at the image model. Frames a second are embedded and added as the timestep is. The
paper does not mention images; here they bypass all of it.

    python -m trainer fit recipe=make_a_video methods.make_a_video=null 'methods.magicvideo={}'

A transformer has no convolutions between its blocks, so its adaptors follow the blocks. The paper
does not describe how the attention tells frames apart; here sines of their number are added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.temporal import Attending, DefaultRate, MaxFrames, frame_rate, item

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.attention.sites import Site


class MagicVideo(Attending):
    """Adaptors for each frame, and directed attention over frames."""

    kind: ClassVar[EditKind] = "structure"
    systems: ClassVar[str] = "MagicVideo"
    paper: ClassVar[str] = "arXiv 2211.11018"

    max_frames: MaxFrames = 32
    renormalise: bool = Field(
        False,
        description="mask the scores before the softmax, as causal attention elsewhere, and not "
        "the probabilities after it, as the paper",
    )
    fps: DefaultRate = 8.0

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.anatomy import attention_points, convolution_points
        from trainer.ops.temporal import layers
        from trainer.ops.temporal.directed import Directed, DirectedAfter

        points = attention_points(model.denoiser)
        items = [frame_rate(model, self.fps)]
        for point in convolution_points(model.denoiser) or points:
            adaptor = layers.FrameAdaptor(point.width, self.max_frames, self.name)
            items.append(item(point, "frame_adaptors", adaptor))
        for point in points:
            block = layers.TemporalAttention(
                point.width,
                heads=self.check_heads(point.width),
                owner=self.name,
                positions="sines",
                max_frames=self.max_frames,
                parallel=True,
            )
            items.append(item(point, "temporal", block))

        def directed(_: Site) -> Any:
            return Directed() if self.renormalise else DirectedAfter()

        return self.inserted(model, items, directed)
