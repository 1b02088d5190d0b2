"""The options of `sample`, and which of them go together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from trainer.cli.given_adapter import Strength, numbers_only
from trainer.cli.options import Count, Frames, Options, SeedNumber
from trainer.cli.sample_known import check_known
from trainer.cli.sample_partners import as_folder
from trainer.common.field_words import Called
from trainer.config.run_section import Device, Precision
from trainer.diffusion.blocks import RECONSTRUCTION

Size = Annotated[int | str, Called("512, or 768x512")]
SAME_CLIP = "source= gives the same clip for every seed; leave count at 1"
SIZE = re.compile(r"(\d+)(?:x(\d+))?")


class SampleOptions(Options):
    """Writes PNGs, or of frames=8 an MP4 and a GIF, and prints their paths. adapter or backbone is
    needed, or from."""

    adapter: Path | tuple[Path, ...] | None = Field(
        None,
        description="a trained adapter: a run folder (of one that has not finished, its last "
        "checkpoint), a checkpoint's folder, an adapter.safetensors, the name of one that ships, "
        "or with backbone= the file of another tool; or several, as in [a,b], which add up",
        examples=["runs/custom_diffusion/<id>"],
    )
    scale: Strength | tuple[Strength, ...] = Field(
        1.0,
        description="strength of what the adapter changes, 0 for the base and 1 as trained; of one "
        "method of it, as in scale.domain_adapter=0, which leaves the others as trained; of "
        "several adapters one each, as in [0.8,0.5]",
    )
    backbone: str | None = Field(
        None,
        description="a backbone by name or folder, without an adapter; beside one, what it is "
        "loaded over in place of the backbone it was trained on",
    )
    prompt: str | None = Field(
        None,
        description="what to generate; {token} and {class} stand for the word and the class_word "
        "that the adapter was trained with. This or prompts is needed",
        examples=['"a <v1> on a blue background"'],
    )
    prompts: Path | None = Field(
        None,
        description="a text file with a prompt on each line, in place of prompt; empty lines and "
        "those that begin with # are passed over",
    )
    count: Count = Field(1, description="pictures or clips, one for each seed from seed on")
    seed: SeedNumber = Field(0, description="of the first one's noise")
    batch: Count | None = Field(
        None,
        description="pictures at once, which changes memory and speed, and of the pictures no more "
        "than the last bits; null goes by their size",
    )
    steps: Count | None = Field(
        None,
        description="steps of the sampler; null takes the preview.steps of the adapter's "
        "recipe, or 25",
    )
    scheduler: str | None = Field(
        None,
        description="the solver by its short name, as in ddim, euler, euler_a, dpmpp_2m_karras, "
        "unipc, heun, lms or pndm (docs/sampling.md has all); null takes the preview.scheduler of "
        "the adapter's recipe, or the backbone's own",
    )
    guidance: float | None = Field(
        None,
        description="strength of classifier-free guidance, 1 for none (arXiv 2207.12598); null "
        "takes the preview.guidance of the adapter's recipe, or 5",
    )
    true_guidance: float | None = Field(
        None,
        description="of backbones as FLUX.1-dev, whose guidance is an input of the network: "
        "classifier-free guidance beside it, in twice the time; null takes the adapter's recipe's, "
        "or 1 for none",
    )
    temporal_guidance: float | None = Field(
        None,
        ge=0,
        description="of clips: strength with which frames are guided away from what they would be "
        "as pictures of their own, in half as much time again (Gen-1, arXiv 2302.03011); 1 for "
        "none; null takes the preview.temporal_guidance of the adapter's recipe, or 1",
    )
    negative: str = Field("", description="a prompt to move away from, in place of the empty one")
    size: Size | None = Field(
        None,
        description="of the pictures in pixels: one side, or width x height; null takes the "
        "run.resolution of the adapter's recipe, or that of the backbone",
    )
    image: Path | None = Field(
        None, description="a picture to begin from, which the prompt changes (SDEdit)"
    )
    strength: float = Field(
        0.8,
        gt=0,
        le=1,
        description="with image=: the share of the steps that are done, from the noise they begin "
        "at; 1 leaves nothing of the picture",
    )
    frames: Count | None = Field(
        None,
        description="frames of a clip, 1 for pictures; null takes those the adapter was "
        "trained on, or 1",
    )
    fps: float | None = Field(
        None,
        gt=0,
        description="frames a second, given to a model that was trained with them and to the "
        "player; null takes data.fps of the adapter's recipe, or plays 8",
    )
    source: Path | None = Field(
        None,
        description="a video that the prompt edits: the clip begins from the noise that DDIM "
        "inversion finds for it; or, for a model that completes a given clip, its first frames",
    )
    between: Frames | None = Field(
        None,
        description="with source=, for a model trained by frame_interpolation: frames to make "
        "between two of the source; null takes as many as it was trained with at most",
    )
    before: Frames | None = Field(
        None, description="likewise: frames to make before the first one of the source"
    )
    after: Frames | None = Field(
        None, description="likewise: frames to make after the last one of the source, at least"
    )
    structure: Path | None = Field(
        None,
        description="a video whose structure the clip has, for models that read it, as those of "
        "recipe=gen1; a grey one is read as depth, bright is near, and of others what differs from "
        "the background is near",
    )
    structure_level: int = Field(
        0,
        ge=0,
        description="with structure=: how often it is made half as fine, up to the "
        "methods.gen1.structure of the adapter's recipe, which leaves next to nothing of it",
    )
    reference: Path | tuple[Path, ...] | None = Field(
        None,
        description="a picture of what is to be shown, or several as in [a.png,b.png], for models "
        "that read some, as those of recipe=ip_adapter",
    )
    reference_scale: float | None = Field(
        None, ge=0, description="with reference=: its strength, 0 for none; null for 1"
    )
    reference_mask: Path | tuple[Path, ...] | None = Field(
        None,
        description="with reference=: where each counts, white in a picture of the shape of what "
        "is generated, as many as the references",
    )
    condition_guidance: float | None = Field(
        None,
        ge=0,
        description="with reference=: strength with which pictures are guided by it, which "
        "guidance then does by the text alone, in half as much time again "
        "(arXiv 2211.09800, equation 3); "
        "null for guidance",
    )
    block: Count | None = Field(
        None,
        description="frames that the model makes at once, of a clip of more frames: block after "
        "block, each going on from the last frames of the one before (arXiv 2204.03458, section "
        "3.1)",
    )
    overlap: Count | None = Field(
        None, description="with block=: frames in common with the block before; null for half"
    )
    known: Path | None = Field(
        None,
        description="a video that is a part of the clip: its first frames (take=4), every n-th one "
        "(every=4), or all of it in a smaller size (shrink=4)",
    )
    take: Count | None = Field(
        None, description="with known=: frames of the video that are read; null for all that fit"
    )
    every: Count = Field(1, description="with known=: the clip's frames from one to the next")
    shrink: Count = Field(
        1, description="with known=: how many times larger the clip is, as latents that are means"
    )
    reconstruction: float = Field(
        RECONSTRUCTION,
        ge=0,
        description="with block= or known=: weight of the gradient that draws the new frames to "
        "the known ones (w_r of equation 7); 0 for the replacement method, which has none",
    )
    corrector: int = Field(
        0, ge=0, description="with block= or known=: Langevin steps at each noise level"
    )
    source_prompt: str | None = Field(
        None,
        description="what source= shows, or what is generated beside it: a method that edits "
        "(p2p, or an adapter of videop2p) then changes that to the prompt",
    )
    null_text: Path | None = Field(
        None,
        description="with source= and source_prompt=: the file of embeddings that an earlier "
        "sample of this clip wrote, in place of optimising them again",
    )
    from_: Path | None = Field(
        None,
        alias="from",
        description="a PNG, GIF or MP4 of `sample`, which is made again, bit for bit, with the "
        "settings in it; other options replace its own",
    )
    out: Path = Field(Path("samples"), description="folder to write into")
    sheet: bool = Field(True, description="of several pictures, write a contact sheet too")
    device: Device = "auto"
    precision: Precision = "auto"
    methods: dict[str, Any] | None = Field(
        None,
        description="methods that train nothing, as in methods.text2video_zero={}; beside an "
        "adapter also options of its own methods that are for sampling alone, as in "
        "methods.videop2p.blend=[fox,cat]",
    )

    @field_validator("size")
    @classmethod
    def _sides(cls, size: Size | None) -> Size | None:
        found = SIZE.fullmatch(str(size))
        if size is not None and (not found or any(int(n) < 16 for n in found.groups() if n)):
            raise ValueError(
                "give one side as in 512, or width x height as in 768x512, each at least 16"
            )
        return size

    @field_validator("scale", mode="before")
    @classmethod
    def _numbers(cls, scale: Any) -> Any:
        return numbers_only(scale)

    @field_validator("out")
    @classmethod
    def _is_a_folder(cls, out: Path) -> Path:
        return as_folder(out)

    @model_validator(mode="after")
    def _agree(self) -> SampleOptions:
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError(
                'prompt is missing, as in prompt="a <v1> on a blue background"; or give '
                "prompts=<file>"
                if self.prompt is None
                else "give prompt or prompts, not both"
            )
        if not self.adapters and self.backbone is None:
            raise ValueError("give adapter=<file or run folder>, or backbone=<name or folder>")
        if len(self.adapters) > 1 and self.methods:
            raise ValueError("methods go with one adapter, or with backbone= alone")
        self._agree_on_strengths()
        self._agree_on_starts()
        return self

    def _agree_on_strengths(self) -> None:
        given = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        if not self.adapters and self.scale != 1:
            raise ValueError("scale is the strength of an adapter; give adapter= too")
        if self.adapters and isinstance(self.scale, tuple) and len(given) != len(self.adapters):
            raise ValueError(
                f"scale has {len(given)} values for {len(self.adapters)} adapters; give one each, "
                "or one for all"
            )

    def _agree_on_starts(self) -> None:
        several = self.count > 1 or self.prompts is not None
        if self.source is not None and several and not self.adapters:  # one may complete it
            raise ValueError(SAME_CLIP)
        if self.image is not None and (self.source is not None or (self.frames or 1) > 1):
            raise ValueError("image= begins a picture, and source= a clip; leave one out")
        if self.image is not None and self.structure is not None:
            raise ValueError("image= begins a picture, and structure= is of a clip; leave one out")
        check_known(vars(self))

    @property
    def adapters(self) -> tuple[Path, ...]:
        if self.adapter is None or isinstance(self.adapter, tuple):
            return self.adapter or ()
        return (self.adapter,)

    @property
    def strength_of(self) -> float:
        """Of the references."""
        return 1.0 if self.reference_scale is None else self.reference_scale

    @property
    def scales(self) -> tuple[Strength, ...]:
        """Of each adapter."""
        return self.scale if isinstance(self.scale, tuple) else (self.scale,) * len(self.adapters)

    @property
    def height_and_width(self) -> tuple[int, int] | None:
        if self.size is None:
            return None
        width, _, height = str(self.size).partition("x")
        return int(height or width), int(width)
