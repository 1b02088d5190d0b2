"""MagicVideo: an adaptor for each frame after every convolution, and directed attention over frames
beside the spatial attention.

    z_i <- (1 + s_i) z_i + b_i    for frame i, channel by channel
    z <- S-Attn(z) + W_o (softmax(q k^T / sqrt(d)) (.) M) v,  M_ij = 1 for j <= i, else 0

Zhou et al., arXiv 2211.11018, section 3.2. M acts after the softmax: no value of a later frame
arrives, but its score has had its share of the sum. With `renormalise` M acts before, and frame i
knows nothing of later ones, as in causal attention elsewhere. s, b and W_o start at zero, so
training starts at the image model. Frames a second are embedded and added as the timestep is. The
paper says nothing of images; here they pass all of it by.

A transformer has no convolutions between its blocks: there the adaptors follow the blocks. What is
published does not say more of how the attention tells frames apart: here by sines of their number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from trainer.methods.method import Edit
from trainer.methods.shared.temporal import Attending, frame_rate, item

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.attention.sites import Site

NAME = "magicvideo"


class MagicVideo(Attending):
    """Options of `Attending`; max_frames: the longest clip there are places for; renormalise: see
    this file's head; fps: frames a second where nobody says."""

    max_frames: int = Field(32, gt=0)
    renormalise: bool = False
    fps: float = Field(8.0, gt=0)

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.anatomy import attention_points, convolution_points
        from trainer.ops.temporal import layers
        from trainer.ops.temporal.directed import Directed, DirectedAfter

        places = attention_points(model.denoiser)
        items = [frame_rate(model, self.fps)]
        for place in convolution_points(model.denoiser) or places:
            adaptor = layers.FrameAdaptor(place.width, self.max_frames, NAME)
            items.append(item(place, "frame_adaptors", adaptor))
        for place in places:
            heads = self.check_heads(place.width)
            block = layers.TemporalAttention(
                place.width, heads, NAME, "sines", self.max_frames, parallel=True
            )
            items.append(item(place, "temporal", block))

        def directed(_: Site) -> Any:
            return Directed() if self.renormalise else DirectedAfter()

        return self.inserted(model, items, NAME, directed)
