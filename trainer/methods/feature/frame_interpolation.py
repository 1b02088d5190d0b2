"""Frame interpolation and extrapolation: a network that makes clips is told some frames of a clip,
and makes the others.

    s_i = [m_i x0_i, m_i],    m_i = 1 for a known frame, else 0
    eps(x_t, t, s),           s as c + 1 further input channels, their weights zero at first
    s_i = [x0_p, x0_n, (i - p) / k, (n - i) / k, m_i]        with fill=neighbours

Make-A-Video (Singer et al., arXiv 2209.14792, section 3.3) masks the frames of a clip with zeros
and gives them, and one channel that says which they are, beside the noisy ones: frames between two
known ones are interpolated, those after the last one or before the first one are extrapolated. With
four frames between two known ones, as there, 16 frames become 76. MagicVideo (Zhou et al., arXiv
2211.11018) has a network of its own that makes frames between keyframes, in the latent space as
here; how it reads the keyframes there is not described here, and this is Make-A-Video's way.

With fill=neighbours every frame is shown the known frames p before and n after it, where the paper
has zeros for unknown ones: a small network need not learn first to fetch them through its layers
over time. trainer/ops/frame_interpolation.py has the details.

It goes with any method that relates frames to each other, as `make_a_video`, whose `fps` tells the
network the rate at which frames are to follow each other, or `magicvideo`: without one, a frame
learns nothing from others.

    python -m trainer fit recipe=frame_interpolation run.id=mine
    python -m trainer sample adapter=runs/frame_interpolation/mine source=clip.mp4 between=3 \\
        prompt="a fox moving left"

What is known is drawn for each clip of a batch. The loss is that of all frames, known ones too. In
sampling, the known frames of the result are those of the source, as the VAE gives them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.temporal import Temporal

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class FrameInterpolation(Temporal):
    """Which frames of a training clip are known."""

    kind: ClassVar[EditKind] = "structure"
    systems: ClassVar[str] = "Frame interpolation of Make-A-Video, MagicVideo"
    paper: ClassVar[str] = "arXiv 2209.14792"

    between: int = Field(
        4,
        gt=0,
        description="unknown frames between two known ones, at most; 4 in the paper. Sampling has "
        "so many where `between` is not given to it",
    )
    extrapolate: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of the clips of which the first or the last frames alone are known",
    )
    blank: float = Field(
        0.1, ge=0, le=1, description="share of the clips of which no frame is known"
    )
    fill: Literal["zeros", "neighbours"] = Field(
        "zeros",
        description="what stands in the place of unknown frames: zeros, as in the paper, or the "
        "known frames before and after each, with their distances, which is learned sooner",
    )

    @model_validator(mode="after")
    def _are_shares(self) -> FrameInterpolation:
        if self.extrapolate + self.blank > 1:
            raise ValueError(
                f"extrapolate={self.extrapolate:g} and blank={self.blank:g} are shares of the "
                "clips, together at most 1; lower one"
            )
        return self

    def apply(self, model: AttentionModel) -> Edit:
        from dataclasses import replace

        from trainer.attention.anatomy import input_convolution
        from trainer.attention.given_frames import GivenFrames
        from trainer.attention.input_channels import InputChannels, channel_item
        from trainer.ops.frame_interpolation import Masking

        _, first = input_convolution(model.denoiser, model.host.traits)
        shares = {"extrapolate": self.extrapolate, "blank": self.blank}
        masking = Masking(self.between, **shares, neighbours=self.fill == "neighbours")
        count = masking.count(first.in_channels)
        channels = InputChannels("known", self.name, count=count, make=masking.channels)
        edit = self.inserted(model, [channel_item(model, channels)])
        return replace(edit, given=GivenFrames(between=self.between, kept=True))
