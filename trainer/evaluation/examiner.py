"""Generates pictures or clips from an adapted model and lets a judge name what they show."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.pairwise import pairwise_cosine_similarity

from trainer.backbones.backbone import Backbone
from trainer.backbones.device import pictures_at_once
from trainer.common.paths import cache_folder
from trainer.config.schema import Recipe
from trainer.data.concept_photos import OneConcept
from trainer.data.kept import kept_pictures
from trainer.data.source import Dataset
from trainer.data.world.scenes import article
from trainer.data.world.sprites import ALL, KNOWN
from trainer.diffusion.made_of import made_of
from trainer.diffusion.sampler import sample_many
from trainer.diffusion.sampling_settings import Sampling
from trainer.evaluation.judge import Judge, clip_score
from trainer.media.images import to_pil, to_tensor
from trainer.media.made_by import with_facts

SEED = 10_000  # of the first picture; previews use small seeds, so these pictures are new


@dataclass(frozen=True)
class Subject:
    """One learned concept.

    token: the trained token; word: a plain word for the concept; sprite: the sprite it shows, None
    for photographs; photos: the judge's embeddings (n, d) of its training pictures.
    """

    token: str
    word: str | None
    sprite: str | None
    photos: Tensor


class Examiner:
    """Generates pictures for a recipe's evaluation prompts and scores them with the judge.

    With several concepts, each is evaluated alone and beside a known sprite, by the recipe's
    prompts with its token (and class word) in place of the first concept's; every pair is also
    evaluated together. A dataset of clips has no photos of a concept, so nothing is learned there.

    train: the training data, concepts' photos first and class images last; num_images: pictures
    for each kind of prompt; batch_size: pictures generated at once; base: the plain backbone, whose
    pictures are cached, since they are the same for every run on it; resumes: whether those of
    other models are kept as well, for an evaluation that is interrupted, until `finish`.
    """

    def __init__(
        self,
        recipe: Recipe,
        judge: Judge,
        train: Dataset,
        *,
        num_images: int,
        batch_size: int,
        base: Backbone | None = None,
        resumes: bool = False,
    ) -> None:
        self.recipe, self.judge, self.base = recipe, judge, base
        self.num_images, self.batch_size, self.resumes = num_images, batch_size, resumes
        self.unfinished: set[Path] = set()
        self.weights: dict[int, str] = {}  # fingerprints; reading all weights takes seconds
        learned = getattr(recipe.data, "concepts", [OneConcept("", "", None)])
        groups = [] if max(train.frames) > 1 else [list(group) for group in train.groups]
        self.subjects = []
        for concept, rows in zip(learned, groups, strict=False):
            photos, sprite = judge.images(_pictures(train, rows)), concept.sprite
            word = sprite or concept.kind
            self.subjects.append(
                Subject(token=concept.token, word=word, sprite=sprite, photos=photos)
            )
        prior = groups[len(learned) :]
        self.others = judge.images(_pictures(train, prior[0][:32])) if prior else None

    def examine(self, model: Backbone) -> dict[str, float | None]:
        """The scores of a model by name; a score that the recipe's prompts or the judge cannot
        give is None or left out."""
        asked, subjects = self.recipe.evaluate, self.subjects
        named = self.judge.names_patches and all(subject.sprite for subject in subjects)
        scores: dict[str, float | None] = {}
        if asked.alone:
            scores |= self._alone(model)
        if asked.beside and named:
            pairs = [self._beside(model, subject) for subject in subjects]
            one, other = (mean(shares) for shares in zip(*pairs, strict=True))
            scores["concept beside another"], scores["the other beside it"] = one, other
        if asked.together and named and len(subjects) > 1:
            scores["two concepts together"] = self._together(model)
        if asked.known and self.judge.names_patches:
            prompts = [
                template.replace("{}", article(word)) for template in asked.known for word in KNOWN
            ]
            pictures = self._sample(model, prompts)
            scores["known sprites"] = _accuracy(
                self.judge.named(pictures, ALL), [_sprite_in(p) for p in prompts]
            )
        return scores

    def accuracy(self, model: Backbone) -> float | None:
        """Accuracy of pictures of one concept each, as a mean over the concepts."""
        found = []
        for subject in self.subjects:
            pictures, _ = self._generate(model, self._asked(subject, self.recipe.evaluate.alone))
            found.append(self._concept_accuracy(subject, pictures))
        return mean(found)

    def _alone(self, model: Backbone) -> dict[str, float | None]:
        """Scores of pictures of one concept each, as means over the concepts. With several
        concepts, the accuracy of each is listed too."""
        accuracy, similarity, alignment = [], [], []
        for subject in self.subjects:
            pictures, prompts = self._generate(
                model, self._asked(subject, self.recipe.evaluate.alone)
            )
            accuracy.append(self._concept_accuracy(subject, pictures))
            alike = pairwise_cosine_similarity(self.judge.images(pictures), subject.photos)
            similarity.append(float(alike.mean()))
            alignment.append(self._alignment(subject, pictures, prompts))
        scores: dict[str, float | None] = {"concept accuracy": mean(accuracy)}
        if len(self.subjects) > 1:
            for subject, share in zip(self.subjects, accuracy, strict=True):
                scores[f"concept accuracy of {subject.token}"] = share
        scores["image similarity"] = mean(similarity)
        scores["text alignment"] = mean(alignment)
        return scores

    def _beside(self, model: Backbone, subject: Subject) -> tuple[float, float]:
        """The shares of pictures that show the concept, and that show the known sprite their
        prompt names beside it."""
        pictures, prompts = self._generate(model, self._asked(subject, self.recipe.evaluate.beside))
        seen = self.judge.found(pictures, ALL).top(2)
        others = [_sprite_in(prompt) for prompt in prompts]
        return (
            _share(subject.sprite in pair for pair in seen),
            _share(word in pair for word, pair in zip(others, seen, strict=True)),
        )

    def _together(self, model: Backbone) -> float:
        """The share of pictures that show both concepts of their prompt, as a mean over all
        pairs of concepts."""
        shares = []
        for one, other in combinations(self.subjects, 2):
            prompts = [
                prompt.replace("{}", one.token, 1).replace("{}", other.token, 1)
                for prompt in self.recipe.evaluate.together
            ]
            pictures, _ = self._generate(model, prompts)
            seen = self.judge.found(pictures, ALL).top(2)
            shares.append(_share({one.sprite, other.sprite} == set(pair) for pair in seen))
        return sum(shares) / len(shares)

    def _asked(self, subject: Subject, prompts: Sequence[str]) -> list[str]:
        """The recipe's prompts, which name the first concept, rewritten for `subject`."""
        first = self.subjects[0]
        if subject is first:
            return list(prompts)
        return [
            prompt.replace(
                f"{first.token} {first.word}", f"{subject.token} {subject.word}"
            ).replace(first.token, subject.token)
            for prompt in prompts
        ]

    def _concept_accuracy(self, subject: Subject, pictures: Tensor) -> float | None:
        """The share of pictures that the judge recognises as the concept.

        A sprite must be named among all sprites. A picture of a photographed concept must be nearer
        to the mean embedding of its photos than to those of the class images and of the other
        concepts' photos; None where there is nothing to compare it with.
        """
        if subject.sprite is not None and self.judge.names_patches:
            return _accuracy(self.judge.named(pictures, ALL), [subject.sprite] * len(pictures))
        rest = [other.photos for other in self.subjects if other is not subject]
        rest += [] if self.others is None else [self.others]
        if not rest:
            return None
        centres = torch.stack([photos.mean(0) for photos in (subject.photos, *rest)])
        nearest = (self.judge.images(pictures) @ centres.T).argmax(1)
        return float((nearest == 0).float().mean())

    def _alignment(
        self, subject: Subject, pictures: Tensor, prompts: Sequence[str]
    ) -> float | None:
        """CLIPScore (0 to 100) of the prompts with the plain word in place of the token; None for
        a concept without a word."""
        word, token = subject.word, subject.token
        if word is None:
            return None
        texts = [prompt.replace(f"{token} {word}", word).replace(token, word) for prompt in prompts]
        return clip_score(self.judge, pictures, texts)

    def _generate(self, model: Backbone, prompts: Sequence[str]) -> tuple[Tensor, list[str]]:
        """`num_images` pictures for prompts that repeat in turn, and the prompt of each."""
        every = [prompts[i % len(prompts)] for i in range(self.num_images)]
        return self._sample(model, every), every

    def clips(
        self, model: Backbone, prompts: Sequence[str], *, frames: int, fps: float | None
    ) -> Tensor:
        """One clip for each prompt, (n, frames, 3, H, W)."""
        pictures = self._sample(model, prompts, frames=frames, fps=fps)
        return pictures.unflatten(0, (-1, frames))

    def finish(self) -> None:
        """Removes the pictures of adapted models: the scores are stored, so nothing resumes."""
        for folder in self.unfinished:
            shutil.rmtree(folder, ignore_errors=True)
        self.unfinished.clear()

    def _sample(
        self, model: Backbone, prompts: Sequence[str], *, frames: int = 1, fps: float | None = None
    ) -> Tensor:
        asked, size = self.recipe.evaluate, self.recipe.run.size
        side = self.recipe.run.resolution or model.resolution
        seeds = [SEED + i for i in range(len(prompts))]
        most = max(1, self.batch_size // frames)
        batch_size = pictures_at_once(most, frames * side**2)
        settings = Sampling(
            asked.steps, asked.guidance, asked.negative, size=size, frames=frames, fps=fps
        )

        def make(batch: range) -> list[Image]:
            own = slice(batch.start // frames, batch.stop // frames)
            pictures = sample_many(
                model, prompts[own], seeds[own], settings=settings, batch_size=batch_size
            )
            facts = [
                made_of(model, settings, prompt=prompts[i], seed=seeds[i], recipe=self.recipe.name)
                for i in range(own.start, own.stop)
            ]
            return [
                with_facts(to_pil(picture), facts[number // frames])
                for number, picture in enumerate(pictures)
            ]

        how = (batch_size, settings.steps, settings.guidance, settings.negative)
        clip = (frames, fps) if frames > 1 else ()
        facts = (list(prompts), seeds, how, *clip, *(size or ()))
        folder = self._folder(model, facts)
        count, at_once = len(prompts) * frames, batch_size * frames
        if folder is None:
            batches = (range(i, min(i + at_once, count)) for i in range(0, count, at_once))
            pictures = [picture for batch in batches for picture in make(batch)]
        else:
            what = "pictures of the base" if model is self.base else "pictures of the adapted model"
            pictures = kept_pictures(folder, count, make, at_once=at_once, what=what)
        return torch.stack([to_tensor(picture) for picture in pictures])

    def _folder(self, model: Backbone, facts: tuple[Any, ...]) -> Path | None:
        """Where the pictures of a model are kept, by all they depend on; None for nowhere."""
        if model is not self.base and not self.resumes:
            return None
        if id(model) not in self.weights:
            self.weights[id(model)] = model.fingerprint()
        own = (self.weights[id(model)], model.device.type, str(model.computes_in), *facts)
        if model is not self.base:
            own = (*own, self.recipe.tree.get("methods"))
        key = hashlib.sha256(repr(own).encode()).hexdigest()[:24]
        folder = cache_folder() / "generated" / key
        if model is not self.base:
            self.unfinished.add(folder)
        return folder


def _accuracy(named: Sequence[str], right: Sequence[str]) -> float:
    metric = MulticlassAccuracy(num_classes=len(ALL), average="micro")
    numbers = {word: number for number, word in enumerate(ALL)}
    named_as, wanted = ([numbers[word] for word in words] for words in (named, right))
    return float(metric(torch.tensor(named_as), torch.tensor(wanted)))


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is unknown (None) or there are no values."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _share(hits: Any) -> float:
    listed = list(hits)
    return sum(listed) / len(listed)


def _sprite_in(prompt: str) -> str:
    found = [word for word in prompt.replace(",", " ").split() if word in KNOWN]
    if len(found) != 1:
        raise ValueError(
            f"evaluate: the prompt {prompt!r} must name one known sprite, and names "
            f"{found or 'none'}"
        )
    return found[0]


def _pictures(data: Dataset, rows: Sequence[int]) -> Tensor:
    return torch.stack([data.image(row) for row in rows])
