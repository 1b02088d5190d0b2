"""Text2Video-Zero: clips from an image model without training; all frames read the first, and a
global motion is put into the latents they start from.

    o_i = softmax(q_i k_0^T / sqrt(d)) v_0    in self-attention, frame i

Khachatryan et al., ICCV 2023, arXiv 2303.13439, section 3.3; the start is `GlobalMotion` in
`trainer/ops/temporal/latents.py`. It has nothing to train:

    python -m trainer sample backbone=tiny methods.text2video_zero={} frames=8 prompt="a fox"

Not here: the paper's smoothing of the background by a mask of what is salient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from trainer.methods.method import Edit, Method
from trainer.methods.shared.aligned import align
from trainer.methods.shared.options import SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Text2VideoZero(Method):
    """sites: the self-attention that reads the first frame; motion: by how much of its width and
    height a frame's content moves left and up from one frame to the next; alone: the share of the
    sampler's steps in which there is the first frame only, until: that at which it is moved.

    The defaults are the paper's: 12 of 512 pixels, steps 2 and 5 of 50.
    """

    kind: ClassVar[Literal["attention"]] = "attention"
    sites: SiteSelector = "self"
    motion: tuple[float, float] = (12 / 512, 12 / 512)
    alone: float = Field(0.04, ge=0, lt=1)
    until: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _in_order(self) -> Text2VideoZero:
        if self.until < self.alone:
            raise ValueError(
                f"until={self.until:g} comes before alone={self.alone:g}; the first frame is "
                "moved after it was begun, so give until at least as much"
            )
        return self

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.hooks import SamplingHook
        from trainer.ops.temporal.latents import GlobalMotion

        edit = align(model, self.sites, ("first",), "text2video_zero")
        motion = GlobalMotion(*self.motion, alone=self.alone, until=self.until)
        return replace(edit, sampling=(SamplingHook(begin=motion.begin),))
