"""Text2Video-Zero: an image model generates clips without training; all frames read the first, and
a global motion is added to the latents they start from.

    o_i = softmax(q_i k_0^T / sqrt(d)) v_0    in self-attention, frame i

Khachatryan et al., ICCV 2023, arXiv 2303.13439, section 3.3; the start is `GlobalMotion` in
`trainer/ops/temporal/latents.py`. It has nothing to train:

    python -m trainer sample backbone=tiny methods.text2video_zero={} frames=8 prompt="a fox"

The paper's smoothing of the background by a mask of salient objects is not built here, nor are its
forms with ControlNet and InstructPix2Pix: a backbone of the latter is refused by its name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from trainer.methods.method import Edit, EditKind, Method
from trainer.methods.shared.aligned import align
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Text2VideoZero(Method):
    """Which attention reads the first frame, and how the latents move."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "Text2Video-Zero"
    paper: ClassVar[str] = "arXiv 2303.13439"
    inflates: ClassVar[bool] = True

    sites: SiteSelector = Field(
        "self", description=f"the self-attention that reads the first frame: {SELECTOR}"
    )
    motion: tuple[float, float] = Field(
        (12 / 512, 12 / 512),
        description="how far the content moves left and up from one frame to the next, as shares "
        "of width and height (12 of 512 pixels in the paper)",
    )
    alone: float = Field(
        0.04,
        ge=0,
        lt=1,
        description="share of the sampler's steps after which the other frames are made from the "
        "first (2 of 50 in the paper)",
    )
    until: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the steps to which the first frame is denoised before it is moved (5 "
        "of 50 in the paper)",
    )

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

        edit = align(model, self.sites, ("first",), owner=self.name)
        motion = GlobalMotion(*self.motion, alone=self.alone, until=self.until)
        return replace(edit, sampling=(SamplingHook(begin=motion.begin),))
