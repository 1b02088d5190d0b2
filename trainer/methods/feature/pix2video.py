"""Pix2Video: an image model edits a clip without training; each frame reads the first frame and the
one before it, and is drawn to the one before it.

    o_i = softmax(q_i [k_0; k_(i-1)]^T / sqrt(d)) [v_0; v_(i-1)]    in the decoder's self-attention
    x_i <- x_i - weight d/dx0_i mean((x0_i - x0_(i-1))^2)           in the first half of the steps

Ceylan et al., ICCV 2023, arXiv 2303.12688, section 3. The paper generates frame by frame and keeps
the features of the first and the previous frame of every step and layer in a bank. Here the frames
of a clip are rows of one batch, so the features of other frames are at hand at each step and layer;
the results are the same, since no frame reads a later one. The paper's backbone, Stable Diffusion
2's for depth, has a depth map as a fifth input channel, which holds the shapes of the source. No
backbone with such a channel is supported: its folder is refused with a sentence that says so, and
here the inverted noise and the other frames' features alone hold the shapes. It has nothing to
train:

    python -m trainer sample backbone=sd15 methods.pix2video={} source=cat.mp4 frames=8 \\
        prompt="an origami cat"
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Method, Use
from trainer.methods.shared.aligned import GUIDANCE, align
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Pix2Video(Method):
    """Which attention reads other frames, and how strongly frames are pulled together."""

    kind: ClassVar[EditKind] = "attention"
    use: ClassVar[Use] = "sample"
    systems: ClassVar[str] = "Pix2Video"
    paper: ClassVar[str] = "arXiv 2303.12688"
    inflates: ClassVar[bool] = True

    sites: SiteSelector = Field(
        "self & up | self & block",
        description="the self-attention that reads other frames: the decoder's of a U-Net, all of "
        f"a transformer, which has no decoder; {SELECTOR}",
    )
    weight: float = Field(
        100.0,
        ge=0,
        description="step size of the guidance; it is over a mean, so it has a stronger effect on "
        "small latents",
    )
    share: float = Field(
        0.5, ge=0, le=1, description="part of the sampler's steps that are guided, the first ones"
    )

    def idle(self) -> dict[str, str]:
        return {} if self.weight else {"share": "weight=0 pulls nothing together"}

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.hooks import SamplingHook
        from trainer.ops.temporal.latents import LatentGuidance

        edit = align(model, self.sites, ("first", "previous"), owner=self.name)
        guidance = LatentGuidance(self.weight, self.share)
        return replace(
            edit,
            claims=(*edit.claims, (model.denoiser_name, GUIDANCE)),
            sampling=(SamplingHook(after_step=guidance.after_step),),
        )
