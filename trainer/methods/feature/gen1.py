"""Gen-1: a convolution over frames after each spatial one, attention over frames after each spatial
attention, and the structure of a clip, its depth, as further input channels.

    x <- conv1d(x), the identity at first;  x <- x + W_o attention(norm(x) + p_i), p_i learned
    conv_in([x_t, s, sines of t_s]),  s the depth made half as fine t_s times, t_s ~ U{0, ..., T_s}
    output = image + w_t (uncond - image) + w (cond - uncond)

Esser et al., arXiv 2302.03011, sections 3.2 to 3.4. `image` is the output of the network without
the layers through time, every frame an image of its own; w_t is `temporal_guidance` of `sample` and
previews. As in the paper, an image is a clip of one frame and bypasses the layers through time; it
has its structure as clips have.

    python -m trainer fit recipe=gen1
    python -m trainer sample adapter=runs/gen1/<id> structure=clip.mp4 structure_level=1 \\
        prompt="a cow on a red background" temporal_guidance=1.2

The paper's depth is that of MiDaS. The embedded world knows its depth. Of other clips no depth
network is used: see `trainer/data/depth.py` for what takes its place, and give a grey clip for
depth that you have. The paper makes the pictures coarser before they are scaled to the latents;
here the depth at the size of the latents is, so that every level differs. Without depth nothing is
added. Content enters by the text alone: the paper trains cross-attention on CLIP image embeddings.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.temporal import PseudoThreeD

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Gen1(PseudoThreeD):
    """Layers through time, and input channels for the structure of a clip."""

    kind: ClassVar[EditKind] = "structure"
    systems: ClassVar[str] = "Gen-1"
    paper: ClassVar[str] = "arXiv 2302.03011"

    structure: int | None = Field(
        7,
        ge=0,
        description="T_s: how often the structure is made half as fine, at most; each clip draws a "
        "number from 0 to it in training, and sampling gives one as structure_level; null adds no "
        "structure",
    )

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.input_channels import InputChannels, channel_item
        from trainer.data.depth import DEPTH
        from trainer.ops.gen1 import WAVES, structure_channels

        items = []
        if self.structure is not None:
            make = partial(structure_channels, most=self.structure)
            channels = InputChannels(
                "structure", self.name, count=1 + WAVES, make=make, reads=(DEPTH,)
            )
            items.append(channel_item(model, channels))
        return self.inserted(model, [*items, *self.layers(model, "learned")])
