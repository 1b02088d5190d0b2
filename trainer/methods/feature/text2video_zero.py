"""Text2Video-Zero: an image model generates clips without training; all frames read the first, and
a global motion is added to the latents they start from.

    o_i = softmax(q_i k_0^T / sqrt(d)) v_0    in self-attention, frame i

Khachatryan et al., ICCV 2023, arXiv 2303.13439, section 3.3; the start is `GlobalMotion` in
`trainer/ops/temporal/latents.py`. It has nothing to train:

    python -m trainer sample backbone=tiny methods.text2video_zero={} frames=8 prompt="a fox"

With `object` the background is smoothed (section 3.3.3, `trainer/ops/temporal/background.py`). The
paper masks the object by a network for salient objects; none is at hand here, so the mask comes
from cross-attention to the object's words. The paper's forms with ControlNet and InstructPix2Pix
are not built: backbones of both are refused by their names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from trainer.methods.method import Edit, EditKind, Method, Use
from trainer.methods.shared.aligned import align
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.ops.temporal.background import Background


class Text2VideoZero(Method):
    """Which attention reads the first frame, and how the latents move."""

    kind: ClassVar[EditKind] = "attention"
    use: ClassVar[Use] = "sample"
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

    object: str | None = Field(
        None,
        description="the words of the prompt that name the object, as in fox: around it the "
        "background is smoothed, for which the clip is sampled twice; null for no smoothing",
    )
    smoothing: float = Field(
        0.6,
        gt=0,
        le=1,
        description="how far the background of a frame is drawn to that of the first one, moved "
        "(alpha, 0.6 in the paper)",
    )
    threshold: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="the object is where the attention to its words has at least this share of the "
        "largest value in the frame",
    )

    def idle(self) -> dict[str, str]:
        if self.object is not None:
            return {}
        why = "the background is not smoothed without object, the words that name the object"
        return {"smoothing": why, "threshold": why}

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
        motion = GlobalMotion(
            *self.motion, alone=self.alone, until=self.until, background=self._background(model)
        )
        return replace(edit, sampling=(SamplingHook(begin=motion.begin),))

    def _background(self, model: AttentionModel) -> Background | None:
        """How the background is smoothed, if it is; ValueError where nothing tells where the object
        is."""
        from trainer.ops.temporal.background import Background

        if self.object is None:
            return None
        sites = [site for site in model.sites if site.kind == "cross"]
        if not sites:
            raise ValueError(
                f"object={self.object} is found by cross-attention, and this backbone has none; "
                "leave object out"
            )
        words = tuple(self.object.split())
        return Background(
            words,
            self.smoothing,
            self.threshold,
            host=model.host,
            sites=sites,
            owner=self.name,
        )
