"""A picture and its edits: a real one inverted, or one generated beside them, with the masks and
maps that were used.

A real picture is encoded to the mean of the VAE's posterior and inverted (`inversion.py`), with
what it shows as its prompt. Edits begin from the noise that finds, and the source's rows run along:
from the same noise, as each step of the inversion, or guided by null-text embeddings, as the method
wants it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import Tensor

from trainer.attention.hooks import SamplingHook
from trainer.backbones.backbone import Backbone
from trainer.diffusion.edit_source import EditSource, edit_source, source_branch
from trainer.diffusion.inversion import invert
from trainer.diffusion.null_text import null_text
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.diffusion.source_clip import mean_latents
from trainer.ops.editing.word_reader import reading_hook

READER = "maps"
ITERATIONS = 3  # calls of the network for each step of an inversion
Advance = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Inverted:
    """A picture as noise. prompt: what it was said to show; start (1, c, h, w): the noise;
    trajectory: the latents before each step, by its number, and by that of all steps the clean
    ones; uncond (steps, n, d): null-text embeddings, None without."""

    prompt: str
    start: Tensor
    trajectory: Mapping[int, Tensor]
    uncond: Tensor | None = None


@dataclass(frozen=True, eq=False)
class EditJob:
    """What is edited. prompts: of the edits, each with the seed; source: what the source shows,
    None for a method without one; inverted: a real source; reference: a second picture; between:
    how many pictures are made between two prompts, the last of which has the next seed; masks
    (1, 1, H, W): of the user, by `source` and `target`; maps: whether the maps of the words that
    differ are read."""

    prompts: Sequence[str]
    source: str | None
    seed: int
    settings: Sampling
    inverted: Inverted | None = None
    reference: Inverted | None = None
    between: int = 0
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    maps: bool = False

    @property
    def rows(self) -> tuple[list[str], list[int]]:
        """The prompt and the seed of each picture."""
        if not self.between:
            return list(self.prompts), [self.seed] * len(self.prompts)
        first, last = self.prompts
        count = self.between + 1
        return [first] * count + [last], [self.seed] * count + [self.seed + 1]


@dataclass(frozen=True, eq=False)
class EditedPictures:
    """pictures (b, 3, H, W) in [-1, 1]: the edits; source (1, 3, H, W): the source as it was
    generated again, or generated beside them, None where there is none; shown: masks and maps
    (b, h, w) of 0 to 1, by what they are of."""

    pictures: Tensor
    source: Tensor | None
    shown: Mapping[str, Tensor]


def invert_picture(
    backbone: Backbone,
    picture: Tensor,
    prompt: str,
    *,
    settings: Sampling,
    advance: Advance = lambda count: None,
) -> Inverted:
    """A picture (1, 3, H, W) in [-1, 1] as noise, in the steps of the settings; with null-text
    embeddings where a method of the model wants them, and the sampling is guided."""
    latents = mean_latents(backbone, picture)
    counted, branch = _Counted(advance), source_branch(backbone)
    tells = None if branch is None else branch[1].tells
    start = invert(
        backbone,
        latents,
        [prompt],
        steps=settings.steps,
        iterations=ITERATIONS,
        known=counted,
        tells=tells or (lambda condition: condition),
    )
    known = {**counted, settings.steps: latents}
    found = Inverted(prompt, start, known)
    wanted = 0 if branch is None or branch[1].replays else branch[1].null_text
    if not wanted or not settings.on(embeds=backbone.embeds_guidance).guided:
        return found
    embeddings = null_text(backbone, latents, known, prompt=prompt, settings=settings, most=wanted)
    return replace(found, uncond=embeddings)


class _Counted(dict[int, Tensor]):
    """Latents by step, which tells how many are there."""

    def __init__(self, advance: Advance) -> None:
        super().__init__()
        self.advance = advance

    def __setitem__(self, step: int, latents: Tensor) -> None:
        super().__setitem__(step, latents)
        self.advance(1)


def edit_pictures(backbone: Backbone, job: EditJob) -> EditedPictures:
    """The edits of one source, at once; raises ValueError for what does not fit the methods of the
    model."""
    seen: list[Tensor] = []
    source = _source(job, lambda step, x_s: seen.append(x_s))
    source = edit_source(backbone, source, job.settings.steps)
    start = None if job.inverted is None else job.inverted.start
    prompts, seeds = job.rows
    count = len(prompts)
    with _reading(backbone, job.maps and source is not None):
        pictures = sample(
            backbone,
            prompts,
            seeds,
            settings=job.settings,
            start=None if start is None else start.repeat(count, 1, 1, 1),
            edited=source,
        )
        shown = used_maps(backbone.hooks)
    return EditedPictures(pictures, backbone.decode(seen[-1][:1]) if seen else None, shown)


@contextmanager
def _reading(backbone: Backbone, maps: bool) -> Iterator[None]:
    """Inside the block, maps of words are read beside what methods do."""
    before = dict(backbone.sampling_hooks)
    if maps:
        backbone.sampling_hooks[READER] = (reading_hook(READER),)
    try:
        yield
    finally:
        backbone.sampling_hooks.clear()
        backbone.sampling_hooks.update(before)


def used_maps(hooks: Sequence[SamplingHook]) -> dict[str, Tensor]:
    """The masks and maps that hooks have used in the last sampling."""
    told = (hook.shown() for hook in hooks if hook.shown is not None)
    return {name: value.float().cpu() for found in told for name, value in found.items()}


def _source(job: EditJob, watch: Callable[[int, Tensor], None]) -> EditSource | None:
    if job.source is None:
        return None
    own = job.inverted
    return EditSource(
        job.source,
        inverted=own is not None,
        uncond=None if own is None else own.uncond,
        trajectory={} if own is None else own.trajectory,
        reference={} if job.reference is None else job.reference.trajectory,
        masks=job.masks,
        watch=watch,
    )
