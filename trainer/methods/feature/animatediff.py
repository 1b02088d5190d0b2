"""AnimateDiff: a motion module after every block is trained on clips while the image model stays
frozen.

    x <- x + W_out block(W_in groupnorm(x)),  block: attention over frames twice, then feed-forward
    attention(z) = W_o softmax(q k^T / sqrt(d)) v  of  layernorm(z) + sines of the frame's number

Guo et al., ICLR 2024, arXiv 2307.04725, section 4.2 and the released code: after each ResNet and
attention of the down and up blocks (the middle block too from version 2 on). W_out is zero at the
start, so training starts at the image model. Images bypass the modules: the image model generates
them unchanged, and the modules can be taken out again.

The other two stages of the paper are LoRA: `domain_adapter` on the image model's attention before,
and MotionLoRA after (`lora` with `sites=temporal`, these modules with train=false). The paper's
noise schedule is linear; here the backbone's own is kept. The released code's group norm is over
each frame by itself, diffusers' over all frames of a clip together: see `norm`. Parameters have the
names and shapes of diffusers' MotionAdapter; `weights` may also be a safetensors file under the
names of the released code (versions 1 and 3 with mid=false).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.temporal import Attending, MaxFrames, item

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class AnimateDiff(Attending):
    """Motion modules and who trains them."""

    kind: ClassVar[EditKind] = "structure"
    systems: ClassVar[str] = "AnimateDiff"
    paper: ClassVar[str] = "arXiv 2307.04725"

    max_frames: MaxFrames = 32
    mid: bool = Field(
        True,
        description="a motion module in the middle block of a U-Net too, as from version 2 of the "
        "released code on",
    )
    norm: Literal["frame", "clip"] | None = Field(
        None,
        description="what the group norm that a module begins with is over: frame, each frame by "
        "itself, as in the released code; clip, all frames of a clip together, as in diffusers; "
        "null is as the modules of `weights` were trained, frame for a file with the released "
        "code's names, and clip for new modules and a MotionAdapter",
    )

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.anatomy import block_points, norm_groups
        from trainer.ops.temporal.layers import MotionModule
        from trainer.ops.temporal.motion_names import ours

        items, per_frame = [], self._per_frame()
        for point in block_points(model.denoiser):
            if point.parent == "mid_block" and not self.mid:
                continue
            module = MotionModule(
                point.width,
                heads=self.check_heads(point.width),
                groups=norm_groups(model.denoiser, point.width),
                max_frames=self.max_frames,
                owner=self.name,
                per_frame=per_frame,
            )
            items.append(item(point, "motion_modules", module))
        return self.inserted(model, items, spelling=ours)

    def _per_frame(self) -> bool:
        from trainer.ops.temporal.weights import trained_per_frame

        if self.norm is None:
            return self.weights is not None and trained_per_frame(self.weights)
        return self.norm == "frame"
