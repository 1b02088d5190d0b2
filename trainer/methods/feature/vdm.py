"""Video diffusion: attention over frames after every spatial attention, trained on clips and images
together.

    x <- x + W_o softmax(q (k + a(j - i))^T / sqrt(d)) (v + b(j - i))
    x <- x + W_o softmax(q k^T / sqrt(d) + bias(j - i)) v    with relative=bias

over the frames j of each pixel, for frame i.

Ho et al., arXiv 2204.03458, section 3. Frames are told apart by their signed distance: the paper
cites Shaw et al. (arXiv 1803.02155), whose vectors a and b are learned for each distance; other
public code learns one bias for each head instead. The paper appends independent images to every
clip and masks this attention so that each attends to itself alone. Here images are clips of one
frame in batches of their own, for which that holds without a mask: an image does pass through the
layer, whose v and W_o learn from it. With `images=bypass` images skip the layer, so training never
changes them.

The paper's longer clips, made block after block by reconstruction guidance, are a matter of
sampling alone and go with other models too: `block=` and `known=` of `sample`, see
`trainer/diffusion/reconstruction.py`.

W_o and its bias start at zero, so training starts at the image model on every frame. The paper
trains the complete network: add `full`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.temporal import Relative, item

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Vdm(Relative):
    """Attention over frames, and what it does to images."""

    kind: ClassVar[EditKind] = "structure"
    systems: ClassVar[str] = "Video diffusion models (VDM)"
    paper: ClassVar[str] = "arXiv 2204.03458"

    images: Literal["self", "bypass"] = Field(
        "self",
        description="whether an image attends to itself, or bypasses the layer, which then never "
        "changes images",
    )

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.anatomy import attention_points
        from trainer.ops.temporal import layers

        items = []
        for point in attention_points(model.denoiser):
            block = layers.TemporalAttention(point.width, self.check_heads(point.width), self.name)
            items.append(item(point, "temporal", block, stills=self.images == "self"))
        return self.inserted(model, items, self.distances())
