"""Video diffusion: attention over frames after every spatial attention, trained on clips and images
together.

    x <- x + W_o softmax(q k^T / sqrt(d) + bias(j - i)) v    over the frames j of each pixel

Ho et al., arXiv 2204.03458, section 3. bias: a number for each head and signed distance between
frames, as the paper's relative positions. The paper adds independent images to the end of every
clip and masks this attention so that each attends to itself alone; here images come as clips of one
frame, in batches of their own, where that is so without a mask: an image does pass through the
layer, whose v and W_o learn of it. `images=bypass` spares images the layer, so that they are the
image model's for good.

W_o and its bias start at zero, so training starts at the image model on every frame. The paper
trains all of the network: add `full`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from trainer.methods import Edit
from trainer.methods.temporal import Attending, item

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.attention.sites import Site
    from trainer.attention.temporal import RelativeBias

NAME = "vdm"


class Vdm(Attending):
    """Options of `Attending`; reach: frames apart up to which distances are told apart; images:
    whether an image attends to itself or passes the layer by."""

    reach: int = Field(32, gt=0)
    images: Literal["self", "bypass"] = "self"

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention import temporal
        from trainer.attention.places import attentions

        items = []
        for place in attentions(model.denoiser):
            block = temporal.TemporalAttention(place.width, self.check_heads(place.width), NAME)
            items.append(item(place, "temporal", block, stills=self.images == "self"))

        def bias(site: Site) -> RelativeBias:
            return temporal.RelativeBias(site.heads, self.reach, NAME)

        return self.inserted(model, items, NAME, bias)
