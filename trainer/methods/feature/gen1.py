"""Gen-1: a convolution over frames after each spatial one, attention over frames after each spatial
attention, and the structure of a source clip as one more input channel.

    x <- conv1d(x), the identity at first;  x <- x + W_o attention(norm(x) + p_i), p_i learned
    output = image + w_t (uncond - image) + w (cond - uncond)

Esser et al., arXiv 2302.03011, sections 3.2 and 3.4. `image` is the output of the network without
the layers through time, every frame an image of its own; w_t is `temporal_guidance` of the sampler.
As in the paper, an image is a clip of one frame and bypasses the layers.

    python -m trainer fit recipe=make_a_video methods.make_a_video=null 'methods.gen1={}'

The paper's structure is the depth that MiDaS estimates, made coarser up to 7 times at random in
training. No depth network is used here: the mean over the channels of the clip's own clean latent
takes its place. It shows more than depth does, and less the higher `structure` is. In sampling it
is the structure of `source`; without a source nothing is added. Content enters by the text alone:
the paper trains cross-attention on CLIP image embeddings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.temporal import PseudoThreeD, item

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Gen1(PseudoThreeD):
    """Layers through time, and one more input channel for the structure of a clip."""

    kind: ClassVar[EditKind] = "structure"
    systems: ClassVar[str] = "Gen-1"
    paper: ClassVar[str] = "arXiv 2302.03011"

    structure: int | None = Field(
        2,
        ge=0,
        description="how often the structure is made half as fine, at most, in training (7 in the "
        "paper); null adds no structure",
    )

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.anatomy import input_convolution
        from trainer.ops.temporal.layers import Structure

        items = []
        if self.structure is not None:
            point, first = input_convolution(model.denoiser, model.host.traits)
            items.append(item(point, "structure", Structure(first, self.structure), many=False))
        return self.inserted(model, [*items, *self.layers(model, "learned")])
