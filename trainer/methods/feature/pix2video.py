"""Pix2Video: a clip edited by an image model without training; each frame reads the first and the
one before, and is drawn to the one before.

    o_i = softmax(q_i [k_0; k_(i-1)]^T / sqrt(d)) [v_0; v_(i-1)]    in the decoder's self-attention
    x_i <- x_i - weight d/dx0_i mean((x0_i - x0_(i-1))^2)           in the first half of the steps

Ceylan et al., ICCV 2023, arXiv 2303.12688, section 3. The paper goes frame by frame and keeps the
features of the first and the last one of every step and layer in a bank; here the frames of a clip
are rows of one batch, where what frame i reads stands at that step and layer: the same numbers,
since no frame reads a later one. It has nothing to train:

    python -m trainer sample backbone=sd15 methods.pix2video={} source=cat.mp4 frames=8 \\
        prompt="an origami cat"
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainer.methods.method import Edit, Method
from trainer.methods.shared.aligned import GUIDANCE, align
from trainer.methods.shared.options import SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Pix2Video(Method):
    """sites: the self-attention that reads other frames, all of it in a transformer, which has no
    decoder; weight: of the guidance, over a mean, so that it counts for more where latents are
    small; share: the part of the sampler's steps that are guided."""

    kind: ClassVar[Literal["attention"]] = "attention"
    sites: SiteSelector = "self & up | self & block"
    weight: float = Field(100.0, ge=0)
    share: float = Field(0.5, ge=0, le=1)

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.hooks import SamplingHook
        from trainer.ops.temporal.latents import LatentGuidance

        edit = align(model, self.sites, ("first", "previous"), "pix2video")
        guidance = LatentGuidance(self.weight, self.share)
        return replace(
            edit,
            claims=(*edit.claims, (model.denoiser_name, GUIDANCE)),
            sampling=(SamplingHook(after_step=guidance.after_step),),
        )
