"""The pictures of an evaluation: generated for prompts, and kept until their scores are stored."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL.Image import Image
from torch import Tensor

from trainer.backbones.backbone import Backbone
from trainer.backbones.device import pictures_at_once
from trainer.backbones.schedulers import sampled_as
from trainer.common.long_work import LongWork
from trainer.common.paths import cache_folder
from trainer.config.schema import Recipe
from trainer.data.kept import kept_pictures
from trainer.diffusion.made_of import made_of
from trainer.diffusion.sampler import sample_many
from trainer.diffusion.sampling_settings import Sampling
from trainer.media.images import to_pil, to_tensor
from trainer.media.made_by import with_facts

SEED = 10_000  # of the first picture; previews use small seeds, so these pictures are new


class PictureMaker:
    """Generates pictures and clips as the section `evaluate` of a recipe says.

    batch_size: pictures generated at once; base: the plain backbone, whose pictures are cached,
    since they are the same for every run on it; resumes: whether those of other models are kept as
    well, for an evaluation that is interrupted, until `finish`. work: is told of each picture, a
    display of the progress is opened for each call where it is None.
    """

    def __init__(
        self, recipe: Recipe, *, batch_size: int, base: Backbone | None, resumes: bool
    ) -> None:
        self.recipe, self.base = recipe, base
        self.batch_size, self.resumes = batch_size, resumes
        self.work: LongWork | None = None
        self.unfinished: set[Path] = set()
        # fingerprints; reading all weights takes seconds
        self.weights: WeakKeyDictionary[Backbone, str] = WeakKeyDictionary()

    def make(
        self,
        model: Backbone,
        prompts: Sequence[str],
        *,
        frames: int = 1,
        fps: float | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """A picture (n, 3, H, W) for each prompt, or the frames of a clip (n * frames, 3, H, W), in
        8 bits a colour, each with a seed of its own. inputs: each (n, ...), as of `sample_many`."""
        settings, side = self.settings(frames, fps), self.recipe.run.resolution or model.resolution
        seeds = [SEED + i for i in range(len(prompts))]
        batch_size = pictures_at_once(max(1, self.batch_size // frames), frames * side**2)

        def make(batch: range) -> list[Image]:
            own = range(batch.start // frames, batch.stop // frames)
            texts, numbers = [prompts[i] for i in own], [seeds[i] for i in own]
            read = {name: value[own.start : own.stop] for name, value in (inputs or {}).items()}
            pictures = sample_many(
                model, texts, numbers, settings=settings, batch_size=batch_size, inputs=read
            ).unflatten(0, (-1, frames))
            return [
                self._signed(model, settings, frame, prompt=text, seed=seed)
                for clip, text, seed in zip(pictures, texts, numbers, strict=True)
                for frame in clip
            ]

        how = _depends_on(settings, batch_size, inputs or {})
        folder = self._folder(model, (list(prompts), seeds, *how))
        count, at_once = len(prompts) * frames, batch_size * frames
        if folder is None:
            batches = (range(i, min(i + at_once, count)) for i in range(0, count, at_once))
            pictures = [picture for batch in batches for picture in make(batch)]
        else:
            what = "pictures of the base" if model is self.base else "pictures of the adapted model"
            pictures = kept_pictures(
                folder, count, make, at_once=at_once, what=what, work=self.work
            )
        return torch.stack([to_tensor(picture) for picture in pictures])

    def settings(self, frames: int, fps: float | None) -> Sampling:
        """How clips of so many frames, or pictures, are sampled."""
        asked, size = self.recipe.evaluate, self.recipe.run.size
        return Sampling(
            asked.steps, asked.guidance, asked.negative, size=size, frames=frames, fps=fps,
            true_guidance=asked.true_guidance,
            temporal_guidance=asked.temporal_guidance if frames > 1 else 1.0,
        )  # fmt: skip

    def _signed(
        self, model: Backbone, settings: Sampling, picture: Tensor, *, prompt: str, seed: int
    ) -> Image:
        """A picture (3, H, W) as an image that says what it was made of."""
        facts = made_of(model, settings, prompt=prompt, seed=seed, recipe=self.recipe.name)
        return with_facts(to_pil(picture), facts)

    def finish(self) -> None:
        """Removes the pictures of adapted models: the scores are stored, so nothing resumes."""
        for folder in self.unfinished:
            shutil.rmtree(folder, ignore_errors=True)
        self.unfinished.clear()

    def _folder(self, model: Backbone, facts: tuple[Any, ...]) -> Path | None:
        """Where the pictures of a model are kept, by all they depend on; None for nowhere."""
        if model is not self.base and not self.resumes:
            return None
        if model not in self.weights:
            self.weights[model] = model.fingerprint()
        how = (model.device.type, str(model.computes_in), sampled_as(model))
        own = (self.weights[model], *how, *facts)
        if model is not self.base:
            own = (*own, self.recipe.tree.get("methods"))
        key = hashlib.sha256(repr(own).encode()).hexdigest()[:24]
        folder = cache_folder() / "generated" / key
        if model is not self.base:
            self.unfinished.add(folder)
        return folder


def _depends_on(
    settings: Sampling, batch_size: int, inputs: Mapping[str, Tensor]
) -> tuple[Any, ...]:
    """What pictures depend on beside the model, the prompts and the seeds."""
    found: list[Any] = [(batch_size, settings.steps, settings.guidance, settings.negative)]
    if settings.frames > 1:
        found += [settings.frames, settings.fps]
    found += settings.size or ()
    if settings.true_guidance != 1:
        found.append(settings.true_guidance)
    if settings.temporal_guidance != 1:
        found += ["in time", settings.temporal_guidance]
    return (*found, *(hashlib.sha256(own.numpy().tobytes()).hexdigest() for own in inputs.values()))
