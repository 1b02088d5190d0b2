"""Imagen Video: attention over frames after the spatial attention of coarse grids, a convolution
over frames where attention is too dear.

    x <- x + W_o attention(x)    on coarse grids, over frames told apart by distance as in vdm
    x <- conv1d(x)               on fine ones, the identity at first

Ho et al., arXiv 2210.02303, section 2.2: the base model is vdm's, the super-resolution models have
convolutions in the place of its temporal attention. In one network: `attention_from` parts the two.
Of images the paper masks the attention, so that each attends to itself alone, and passes the
convolution by; here so do clips of one frame. The paper predicts v (`objective.target=v`) with
noise conditioning in a cascade of seven models; the cascade is not here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from trainer.methods.method import Edit
from trainer.methods.shared.temporal import Relative, item

if TYPE_CHECKING:
    from torch import nn

    from trainer.attention.anatomy import InsertionPoint
    from trainer.attention.model import AttentionModel

NAME = "imagen_video"


class ImagenVideo(Relative):
    """Options of `Relative`; attention_from: grids that many times coarser than the latent and
    more have attention, finer ones the convolution; 1 is attention everywhere. kernel: frames a
    convolution sees."""

    attention_from: int = Field(2, gt=0)
    kernel: int = Field(3, gt=0)

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.anatomy import attention_points
        from trainer.ops.temporal import layers

        items = []
        for place in attention_points(model.denoiser):
            attends = self.attends(place)
            block: nn.Module = layers.TemporalConv(place.width, self.kernel)
            if attends:
                heads = self.check_heads(place.width)
                block = layers.TemporalAttention(place.width, heads, NAME)
            items.append(item(place, "temporal", block, stills=attends))
        return self.inserted(model, items, NAME, self.distances(NAME))

    def attends(self, place: InsertionPoint) -> bool:
        return place.divisor is None or place.divisor >= self.attention_from
