"""Gen-1: a convolution over frames after each spatial one, attention over frames after each spatial
attention, and the structure of a source clip as one more input channel.

    x <- conv1d(x), the identity at first;  x <- x + W_o attention(norm(x) + p_i), p_i learned
    output = image + w_t (uncond - image) + w (cond - uncond)

Esser et al., arXiv 2302.03011, sections 3.2 and 3.4. `image` is the network with the layers through
time passed by, every frame an image of its own: w_t is `temporal_guidance` of the sampler. The
paper takes an image for a clip of one frame and passes the layers by for it; here too.

The paper's structure is depth, as MiDaS estimates it, made coarser up to 7 times at random in
training. Here no depth network is at hand: the mean over the channels of the clip's own clean
latent stands for it, and shows more than depth does, the less the higher `structure`. In sampling
it is that of `source`; without one nothing is added. Content enters by the text alone: the paper
trains cross-attention on CLIP image embeddings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, Kind
from trainer.methods.shared.temporal import PseudoThreeD, item

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Gen1(PseudoThreeD):
    """Layers through time, and one more input channel for the structure of a clip."""

    kind: ClassVar[Kind] = "structure"
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
