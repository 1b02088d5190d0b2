"""The pictures and clips of `sample`: generated in batches, each written as soon as it is there,
and a contact sheet of several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common.paths import slug

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from trainer.backbones.backbone import Backbone
    from trainer.diffusion.edit_source import EditSource
    from trainer.diffusion.from_image import InitialImage
    from trainer.diffusion.given_clip import GivenClip
    from trainer.diffusion.known_frames import KnownFrames
    from trainer.diffusion.sampling_settings import Sampling

AT_ONCE = 16  # pictures that one batch generates; at least one clip
Pair = tuple[str, int]  # a prompt and a seed


@dataclass(frozen=True)
class SampleJob:
    """What is to be written. prompts: with every seed each; batch: pictures at once, None for a
    number that goes by their size; row: of a picture that is repeated, the row it had in its batch,
    whose other rows are generated too and left out; facts: of all pictures; start, image, known,
    edited: as of `sampler.sample`, for one clip; inputs: as of `channels_for` and
    `sample`, likewise; given: a clip that each completes."""

    prompts: Sequence[str]
    seeds: range
    settings: Sampling
    out: Path
    played: float
    batch: int | None = None
    row: int | None = None
    sheet: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    start: Tensor | None = None
    image: InitialImage | None = None
    known: KnownFrames | None = None
    given: GivenClip | None = None
    edited: EditSource | None = None


def check_fit(backbone: Backbone, settings: Sampling) -> None:
    """Raises ValueError for a side in pixels, a number of frames, or a solver, that the backbone
    does not have."""
    from trainer.backbones.folder_facts import check_side
    from trainer.backbones.schedulers import with_solver

    for side in settings.size or ():
        check_side("size", side, backbone.multiple)
    backbone.clip_frames.check(settings.frames)
    if settings.sampler is not None:
        with_solver(backbone.scheduler(), settings.sampler, key="scheduler")


def written(backbone: Backbone, job: SampleJob) -> Iterator[Path]:
    """The files, each as soon as it is written, and the sheet as the last."""
    from trainer.diffusion.made_of import last_bits, made_of
    from trainer.media.contact_sheet import thumbnail
    from trainer.media.images import to_pil
    from trainer.media.write_video import write_clip

    job.out.mkdir(parents=True, exist_ok=True)
    frames = job.settings.frames
    known = {**last_bits(backbone, job.settings), **job.facts}
    small: dict[Pair, Image] = {}
    for part in _parts(backbone, job):
        pictures = _generated(backbone, job, part)
        for row, (pair, clip) in enumerate(zip(part, pictures.split(frames), strict=True)):
            if job.row not in (None, row):
                continue
            prompt, seed = pair
            among = {"batch": len(part), "row": row} if len(part) > 1 else {}
            facts = made_of(backbone, job.settings, prompt=prompt, seed=seed, **among, **known)
            place = job.out / f"{slug(prompt)}-{seed}"
            yield from write_clip(clip, place, job.played, facts=facts)
            if job.sheet and frames == 1:
                small[pair] = thumbnail(to_pil(clip[0]))
    if len(small) > 1:
        own = {"seeds": list(job.seeds), "rows": list(job.prompts), **known}
        prompt, seed = " | ".join(job.prompts), job.seeds[0]
        facts = made_of(backbone, job.settings, prompt=prompt, seed=seed, **own)
        yield from _sheet(job, small, facts)


def _generated(backbone: Backbone, job: SampleJob, part: Sequence[Pair]) -> Tensor:
    import torch

    from trainer.diffusion.channel_values import channels_for
    from trainer.diffusion.given_clip import complete
    from trainer.diffusion.sampler import sample

    prompts, seeds = [prompt for prompt, _ in part], [seed for _, seed in part]
    if job.given is not None:
        return complete(backbone, prompts, seeds, given=job.given, settings=job.settings).cpu()
    inputs = {name: torch.cat([value] * len(part)) for name, value in job.inputs.items()}
    return sample(
        backbone,
        prompts,
        seeds,
        settings=job.settings,
        channels=channels_for(backbone, seeds, job.settings, inputs=inputs),
        inputs=inputs,
        start=job.start,
        image=job.image,
        known=job.known,
        edited=job.edited,
    ).cpu()


def _parts(backbone: Backbone, job: SampleJob) -> list[list[Pair]]:
    """The prompts and seeds of each batch."""
    from trainer.backbones.device import pictures_at_once

    frames = job.settings.frames
    height, width = job.settings.size or (backbone.resolution, backbone.resolution)
    at_once = job.batch
    if at_once is None:
        at_once = pictures_at_once(max(1, AT_ONCE // frames), frames * height * width)
    if job.row is not None:
        first = job.seeds[0] - job.row
        return [[(job.prompts[0], (first + n) % 2**63) for n in range(at_once)]]
    pairs = [(prompt, seed) for prompt in job.prompts for seed in job.seeds]
    return [pairs[at : at + at_once] for at in range(0, len(pairs), at_once)]


def _sheet(job: SampleJob, small: Mapping[Pair, Image], facts: Mapping[str, Any]) -> list[Path]:
    """Writes the contact sheet: a strip for each prompt, with the seeds below its pictures. facts:
    of all of them."""
    from trainer.media.contact_sheet import Strip, contact_sheet
    from trainer.media.made_by import png_bytes, with_facts
    from trainer.media.write_video import write_once

    strips = []
    for prompt in dict.fromkeys(job.prompts):
        own = [(seed, picture) for (text, seed), picture in small.items() if text == prompt]
        strips.append(Strip(prompt, [each for _, each in own], [str(seed) for seed, _ in own]))
    sheet = {".png": png_bytes(with_facts(contact_sheet(strips), facts))}
    return write_once(sheet, job.out / f"{slug(job.prompts[0])}-sheet")
