"""Imagen Video: attention over frames after the spatial attention of coarse grids, and a
convolution over frames on fine grids, where attention would cost too much.

    x <- x + W_o attention(x)    on coarse grids, frames told apart by their distance as in vdm
    x <- conv1d(x)               on fine ones, the identity at first

Ho et al., arXiv 2210.02303, section 2.2: the base model is that of vdm, and its super-resolution
models have convolutions in place of the temporal attention. Here both may be in one network:
`attention_from` is the grid at which they change. The paper masks the attention for images, so that
each attends to itself alone, and lets them bypass the convolution; clips of one frame do the same
here. The paper predicts v (`objective.target=v`), in a cascade of seven models. Three stages of it
are recipes, the later ones with the method `cascade`:

    python -m trainer fit recipe=imagen_video
    python -m trainer fit recipe=imagen_video_tsr        # more frames
    python -m trainer fit recipe=imagen_video_ssr        # more pixels
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.temporal import KernelFrames, Relative, item

if TYPE_CHECKING:
    from torch import nn

    from trainer.attention.anatomy import InsertionPoint
    from trainer.attention.model import AttentionModel


class ImagenVideo(Relative):
    """Attention over frames on coarse grids, a convolution over frames on fine ones."""

    kind: ClassVar[EditKind] = "structure"
    systems: ClassVar[str] = "Imagen Video"
    paper: ClassVar[str] = "arXiv 2210.02303"

    attention_from: int = Field(
        2,
        gt=0,
        description="grids so many times coarser than the latent, and coarser ones, have the "
        "attention, finer ones the convolution; 1 is attention everywhere",
    )
    kernel: KernelFrames = 3

    def idle(self) -> dict[str, str]:
        if self.attention_from > 1:
            return {}
        return {"kernel": "attention_from=1 is attention everywhere, and no convolution"}

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.anatomy import attention_points
        from trainer.ops.temporal import layers

        items = []
        for point in attention_points(model.denoiser):
            attends = self.attends(point)
            block: nn.Module = layers.TemporalConv(point.width, self.kernel)
            if attends:
                heads = self.check_heads(point.width)
                block = layers.TemporalAttention(point.width, heads, self.name)
            items.append(item(point, "temporal", block, stills=attends))
        return self.inserted(model, items, self.distances())

    def attends(self, point: InsertionPoint) -> bool:
        """Whether an insertion point has the attention, and not the convolution."""
        return point.divisor is None or point.divisor >= self.attention_from
