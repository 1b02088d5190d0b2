"""Cascade: a network is told a clip, or picture, with fewer frames or pixels and noise over it, and
makes the complete one.

    z' = sqrt(1 - l^2) z + l noise,    z: every `time`-th frame, `space` times coarser
    eps(x_t, t, up(z'), l),            up(z') as further input channels, their weights zero at first

Noise conditioning augmentation is that of Ho et al., arXiv 2106.15282, section 4; Imagen Video (Ho
et al., arXiv 2210.02303, sections 2.3 and 2.7) uses it in its models for temporal and spatial
super-resolution. Each clip of a batch has a level l of its own, uniform in [0, `most`), which the
network is told. Sampling has one low level: the condition comes from an earlier model, whose
defects the noise hides. The paper gives it as signal to noise, (1 - l^2) / l^2: 3 is l = 0.5.

Here z is made of clean latents, where the paper has pixels; frames are repeated, pixels
interpolated; and one more channel says which frames z has, which the paper does not mention. Text
stays a condition, as there.

The models run one after another, each on the file of the one before:

    python -m trainer sample adapter=runs/imagen_video/<id> prompt="a fox moving left"
    python -m trainer sample adapter=runs/imagen_video_tsr/<id> source=<the clip> prompt=...
    python -m trainer sample adapter=runs/imagen_video_ssr/<id> source=<the clip> prompt=...

Time needs a method beside it that relates frames to each other, as `imagen_video`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.temporal import Temporal, item

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Cascade(Temporal):
    """What the given clip lacks, and how much noise is laid over it."""

    kind: ClassVar[EditKind] = "structure"
    systems: ClassVar[str] = "Temporal and spatial super-resolution of Imagen Video"
    paper: ClassVar[str] = "arXiv 2210.02303"

    time: int = Field(1, gt=0, description="frames to make for each frame of the given clip")
    space: int = Field(
        1, gt=0, description="how many times coarser the given clip is along an edge of its latents"
    )
    most: float = Field(
        1.0, gt=0, le=1, description="the highest level of noise over the given clip in training"
    )
    level: float = Field(
        0.1, ge=0, lt=1, description="the level of noise over the given clip in sampling"
    )

    @model_validator(mode="after")
    def _raises_something(self) -> Cascade:
        if self.time == self.space == 1:
            raise ValueError(
                "time=1 and space=1 give the clip that is to be made; give time=4 for more frames, "
                "or space=2 for more pixels"
            )
        if self.level > self.most:
            raise ValueError(
                f"level={self.level:g} is above most={self.most:g}, which training never has; "
                "lower it"
            )
        return self

    def apply(self, model: AttentionModel) -> Edit:
        from dataclasses import replace

        from trainer.attention.anatomy import input_convolution, time_point
        from trainer.attention.given_frames import GivenFrames
        from trainer.attention.input_channels import InputChannels, channel_item
        from trainer.ops.cascade import CLIP, TOLD, AugmentationLevel, LowerClip

        traits = model.host.traits
        _, first = input_convolution(model.denoiser, traits)
        when = time_point(model.denoiser, traits)
        lower = LowerClip(self.time, self.space, self.most)
        channels = InputChannels(CLIP, self.name, first.in_channels + 1, make=lower.channels)
        told = AugmentationLevel(when.width)
        items = [
            channel_item(model, channels),
            item(when, TOLD, told, stills=True, many=False),
        ]
        model.input_channels[TOLD] = InputChannels(TOLD, self.name, 1, make=lower.levels)
        given = GivenFrames(between=self.time - 1, fixed=True, level=self.level)
        return replace(self.inserted(model, items), given=given)
