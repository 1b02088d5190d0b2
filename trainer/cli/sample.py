"""`sample`: generates pictures or clips with an adapter or a backbone."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from trainer.cli.options import Count, Options, SeedNumber, quiet_libraries, read_options
from trainer.config import lineage
from trainer.config import load as recipes
from trainer.config.run_section import Device, Precision
from trainer.methods.method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.backbones.backbone import Backbone
    from trainer.diffusion.sampling_settings import Sampling

AT_ONCE = 16  # pictures that one batch generates; at least one clip
INVERTING = 3  # calls of the network for each step of an inversion


class SampleOptions(Options):
    """Writes PNGs, or of frames=8 an MP4 and a GIF, and prints their paths. adapter or backbone is
    needed."""

    adapter: Path | None = Field(
        None,
        description="a trained adapter: a run folder, its adapter.safetensors, or the name "
        "of one that ships",
        examples=["runs/custom_diffusion/<id>"],
    )
    backbone: str | None = Field(
        None,
        description="a backbone by name or folder, without an adapter; beside one, what it is "
        "loaded over in place of the backbone it was trained on",
    )
    prompt: str = Field(
        description="what to generate; {token} and {class} stand for the word and the class_word "
        "that the adapter was trained with",
        examples=['"a <v1> on a blue background"'],
    )
    count: Count = Field(1, description="pictures or clips, one for each seed from seed on")
    seed: SeedNumber = Field(0, description="of the first one's noise")
    steps: Count | None = Field(
        None,
        description="steps of the sampler; null takes the preview.steps of the adapter's "
        "recipe, or 25",
    )
    guidance: float | None = Field(
        None,
        description="strength of classifier-free guidance, 1 for none (arXiv 2207.12598); null "
        "takes the preview.guidance of the adapter's recipe, or 5",
    )
    negative: str = Field("", description="a prompt to move away from, in place of the empty one")
    resolution: int | None = Field(
        None,
        ge=16,
        description="side of the pictures in pixels; null takes the run.resolution of the "
        "adapter's recipe, or that of the backbone",
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
        "player; null plays 8",
    )
    source: Path | None = Field(
        None, description="a video whose structure the clip keeps, see start"
    )
    start: Literal["source", "noise"] = Field(
        "source",
        description="with source=: begin from the noise that DDIM inversion finds for the video "
        "(the prompt then edits it), or from the seed's noise",
    )
    out: Path = Field(Path("samples"), description="folder to write into")
    device: Device = "auto"
    precision: Precision = "auto"
    methods: dict[str, Any] | None = Field(
        None,
        description="with backbone=: methods that train nothing, as in methods.text2video_zero={}",
    )

    @model_validator(mode="after")
    def _agree(self) -> SampleOptions:
        if self.adapter is None and self.backbone is None:
            raise ValueError("give adapter=<file or run folder>, or backbone=<name or folder>")
        if self.adapter is not None and self.methods:
            raise ValueError("an adapter brings its methods along; methods go with backbone= alone")
        if self.count > 1 and self.source is not None and self.start == "source":
            raise ValueError("start=source gives the same clip for every seed; leave count at 1")
        return self


def run(words: list[str]) -> int:
    options = read_options(words, SampleOptions)
    chosen = recipes.methods_of(options.methods) if options.methods else {}
    quiet_libraries()
    kinds = set()
    for path in _written(options, chosen):
        print(path)
        kinds.add(path.suffix)
    if kinds == {".gif"}:
        print("no MP4 beside it: PyAV writes one, pip install 'av>=18'", file=sys.stderr)
    return 0


def _written(options: SampleOptions, chosen: Mapping[str, Method]) -> Iterator[Path]:
    """The files of `sample`, each as soon as it is written."""
    from trainer.backbones.device import pictures_at_once
    from trainer.diffusion.made_of import made_of
    from trainer.diffusion.sampler import sample
    from trainer.media.write_video import PLAYED, write_clip

    backbone, tree = _model(options, chosen)
    prompt, negative = _prompts(options, backbone, tree)
    settings = _settings(options, tree, negative)
    frames, data = settings.frames, tree.get("data") or {}
    side = backbone.resolution if settings.size is None else settings.size[0]
    source, start = _source(backbone, options, settings, data=data)
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = range(options.seed, options.seed + options.count)
    at_once = pictures_at_once(max(1, AT_ONCE // frames), frames * side**2)
    known = _origin(options)
    for part in (seeds[i : i + at_once] for i in range(0, len(seeds), at_once)):
        pictures = sample(
            backbone,
            [prompt] * len(part),
            part,
            settings=settings,
            source=None if source is None else source.repeat((len(part), 1, 1, 1)),
            start=start,
        ).cpu()
        for seed, clip in zip(part, pictures.split(frames), strict=True):
            place = options.out / f"{slug(prompt)}-{seed}"
            facts = made_of(backbone, settings, prompt=prompt, seed=seed, **known)
            yield from write_clip(clip, place, options.fps or PLAYED, facts=facts)


def _origin(options: SampleOptions) -> dict[str, Any]:
    """What else a picture is made of, as facts for its file."""
    from trainer.config.header import file_of
    from trainer.runs.adapter import adapter_facts

    found: dict[str, Any] = {}
    if options.adapter is not None:
        found |= adapter_facts(file_of(options.adapter))
    if options.methods:
        found["methods"] = options.methods
    if options.source is not None:
        with options.source.open("rb") as file:
            found["source_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        found |= {"source": options.source.name, "start": options.start}
    return found


def _model(
    options: SampleOptions, chosen: Mapping[str, Method]
) -> tuple[Backbone, Mapping[str, Any]]:
    """The model, placed, and the recipe's tree where an adapter has one."""
    from trainer.backbones.device import choose_placement, place
    from trainer.config.header import file_of
    from trainer.methods.apply import apply_methods
    from trainer.runs.adapter import load_adapted, load_base

    placement = choose_placement(options.device, options.precision)
    if options.adapter is not None:
        return load_adapted(file_of(options.adapter), options.backbone, placement)
    assert options.backbone is not None
    spec = lineage.backbone_spec(options.backbone)
    backbone = load_base(spec, options.backbone, placement, hold=not chosen)
    if chosen:
        apply_methods(backbone, chosen, trains=False)
        place(backbone, placement)
    return backbone, {}


def _settings(options: SampleOptions, tree: Mapping[str, Any], negative: str) -> Sampling:
    """As the options say, and else the recipe of the adapter."""
    from trainer.diffusion.sampling_settings import Sampling

    previews, data, run = (tree.get(key) or {} for key in ("preview", "data", "run"))
    guidance = options.guidance
    side = options.resolution or run.get("resolution")
    return Sampling(
        options.steps or int(previews.get("steps", 25)),
        float(previews.get("guidance", 5.0)) if guidance is None else guidance,
        negative,
        size=None if side is None else (int(side), int(side)),
        frames=options.frames or int(data.get("frames", 1)),
        fps=options.fps,
    )


def _prompts(
    options: SampleOptions, backbone: Backbone, tree: Mapping[str, Any]
) -> tuple[str, str]:
    """The prompt and the negative one; says where one is longer than what is read of it.

    Raises:
        ValueError: a word that the model does not have, or does not read.
    """
    from trainer.config.captions import check_read
    from trainer.config.prompts import words_in

    words = words_in(tree, backbone.tokenizer.get_vocab())
    found = []
    for key in ("prompt", "negative"):
        found.append(words.prompt(getattr(options, key), key))
        for line in check_read(found[-1], key, words.added, reader=backbone.prompts.reader):
            print(line, file=sys.stderr)
    return found[0], found[1]


def _source(
    backbone: Backbone, options: SampleOptions, settings: Sampling, *, data: Mapping[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Clean latents (frames, c, h, w) of the source clip, and the noise that becomes them where
    sampling begins from it."""
    from trainer.common.long_work import long_work
    from trainer.data.kept import KeptSteps
    from trainer.diffusion.inversion import invert
    from trainer.diffusion.source_clip import source_latents

    if options.source is None:
        return None, None
    steps, frames = settings.steps, settings.frames
    size = None if settings.size is None else settings.size[0]
    source = source_latents(
        backbone, options.source, frames=frames, fps=options.fps, data=data, side=size
    )
    if options.start == "noise":
        return source, None
    kept = KeptSteps(_inversion_folder(backbone, options, source, steps=steps))
    with long_work("inversion", steps, len(kept)) as advance:
        kept.stored = advance
        start = invert(
            backbone,
            source,
            [""],
            steps=steps,
            frames=frames,
            fps=options.fps,
            iterations=INVERTING,
            known=kept,
        )
    shutil.rmtree(kept.folder, ignore_errors=True)  # it is for an inversion that is interrupted
    return source, start


def _inversion_folder(
    backbone: Backbone, options: SampleOptions, source: Tensor, *, steps: int
) -> Path:
    """Where the steps of an inversion are kept, by all they depend on."""
    from trainer.common.paths import cache_folder

    digest = hashlib.sha256(source.cpu().numpy().tobytes())
    facts = (backbone.fingerprint(), backbone.device.type, str(backbone.computes_in), steps)
    own = (options.adapter, options.backbone, options.methods, options.fps, options.frames)
    digest.update(repr((*facts, *own)).encode())
    return cache_folder() / "inversion" / digest.hexdigest()[:24]


def slug(text: str) -> str:
    """Text as a file name, of at most 60 letters."""
    words = "".join(letter if letter.isalnum() else " " for letter in text).split()
    return "-".join(words)[:60] or "sample"
