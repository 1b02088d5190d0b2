"""Generates pictures or clips from an adapted model and lets judges say what they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.backbones.backbone import Backbone
from trainer.config.schema import Recipe
from trainer.data.source import Dataset
from trainer.data.world.sprites import ALL, KNOWN
from trainer.evaluation.feature_scores import (
    LEAST,
    alike,
    diversity,
    kernel_distance,
    text_alignment,
)
from trainer.evaluation.generated import PictureMaker
from trainer.evaluation.judge import Judge
from trainer.evaluation.open_judges import PictureJudge, line_of, reader_of
from trainer.evaluation.questions import PromptGroup, Subject, ask
from trainer.evaluation.shares import Share, share
from trainer.evaluation.sprite_scores import SpriteScores, share_named

Scores = dict[str, float | None]
Features = Sequence[Tensor]  # of the same pictures by each judge


class Examiner:
    """Generates pictures for a recipe's evaluation prompts and scores them with the judges.

    With several concepts, each is evaluated alone and beside a known sprite, by the recipe's
    prompts with its token (and class word) in place of the first concept's; every pair is also
    evaluated together. Data without a concept are evaluated by their captions.

    judge: or several; the first that reads texts names what pictures show. train: the training
    data, concepts' photos first and class images last; held_out: what its captions are taken from
    where there is no concept; num_images: pictures for each kind of prompt; batch_size, base,
    resumes: as of `PictureMaker`. notes: what is not scored, and why.
    """

    def __init__(
        self,
        recipe: Recipe,
        judge: PictureJudge | Sequence[PictureJudge],
        train: Dataset,
        *,
        num_images: int,
        batch_size: int,
        base: Backbone | None = None,
        resumes: bool = False,
        held_out: Dataset | None = None,
    ) -> None:
        self.judges = list(judge) if isinstance(judge, Sequence) else [judge]
        self.reader = reader_of(self.judges)
        self.maker = PictureMaker(recipe, batch_size=batch_size, base=base, resumes=resumes)
        self.asked = ask(recipe, self.judges, train, held_out=held_out, count=num_images)
        self.notes = [*self.asked.notes, *self._too_few()]

    def examine(self, model: Backbone) -> Scores:
        """The scores of a model by name; a score that the recipe's prompts or the judges cannot
        give is None or left out."""
        asked, scores = self.asked, Scores()
        if asked.alone:
            scores |= self._alone(model)
        if asked.beside:
            scores |= means([self._beside(model, question) for question in asked.beside])
        if asked.together:
            shares = [self._together(model, question) for question in asked.together]
            scores["two concepts together"] = mean(shares)
        for question in asked.known:
            pictures = self._sample(model, question.prompts)
            words = [_sprite_in(prompt) for prompt in question.prompts]
            scores["known sprites"] = share_named(self._reader.named(pictures, ALL), words)
            scores |= self.truth.known(pictures, words) if self.truth else {}
        return scores

    def accuracy(self, model: Backbone) -> float | None:
        """Accuracy of pictures of one concept each, as a mean over the concepts."""
        found = []
        for question in self.asked.alone:
            pictures = self._sample(model, question.prompts)
            found.append(self._concept_accuracy(question.subjects[0], pictures))
        return mean(found)

    @cached_property
    def truth(self) -> SpriteScores | None:
        """What the embedded world's truth says; None where the judge names no sprites."""
        return SpriteScores.beside(self.reader)

    @property
    def _reader(self) -> Judge:
        assert self.reader is not None, "sprites are named by a judge that reads texts"
        return self.reader

    def _alone(self, model: Backbone) -> Scores:
        """Scores of pictures of one concept each, as means over the concepts. With several
        concepts, the accuracy of each is listed too. Of data without a concept, those of pictures
        for its captions."""
        subjects, accuracy, lines = self.asked.subjects, [], []
        plain = self.asked.plain or [PromptGroup([])] * len(self.asked.alone)
        for question, other in zip(self.asked.alone, plain, strict=True):
            pictures, subject = self._sample(model, question.prompts), question.subjects[0]
            seen = self._seen(pictures)
            if subjects:
                accuracy.append(self._concept_accuracy(subject, pictures, seen))
            kind = None
            if other.prompts:
                kind = self._seen(self._sample(model, other.prompts))
            lines.append(self._true(subject, pictures) | self._alike(question, seen, kind))
        scores = Scores()
        if subjects:
            scores["concept accuracy"] = mean(accuracy)
        if len(subjects) > 1:
            for subject, share in zip(subjects, accuracy, strict=True):
                scores[f"concept accuracy of {subject.token}"] = share
        return scores | means(lines)

    def _true(self, subject: Subject, pictures: Tensor) -> Scores:
        """What the truth says of one sprite's pictures; nothing of photographs."""
        if self.truth is None or subject.sprite is None:
            return {}
        return {**self.truth.alone(pictures, subject.sprite)}

    def _alike(self, question: PromptGroup, seen: Features, kind: Features | None) -> Scores:
        """What the judges' features say of one concept's pictures. kind: the features of pictures
        of other things of its kind."""
        photos = question.subjects[0].photos
        scores: Scores = self._by_judge("alike", lambda n: alike(seen[n], photos[n]))
        if question.texts is not None:
            texts = question.texts
            for number, judge in enumerate(self.judges):
                if isinstance(judge, Judge):
                    aligned = text_alignment(seen[number], judge.texts(texts))
                    scores[line_of("text", judge, self.judges)] = aligned
        if len(set(question.prompts)) < len(question.prompts):
            scores |= self._by_judge("DIV", lambda n: diversity(seen[n], question.prompts))
        if kind is not None:
            scores |= self._by_judge("PRES", lambda n: alike(kind[n], photos[n]))
        if self._enough(question):
            scores |= self._by_judge("KID", lambda n: kernel_distance(photos[n], seen[n]))
        return scores

    def _by_judge(self, score: str, of: Callable[[int], float | None]) -> Scores:
        """A score by each judge; of: takes the judge's number."""
        return {
            line_of(score, judge, self.judges): of(number)
            for number, judge in enumerate(self.judges)
        }

    def _enough(self, question: PromptGroup) -> bool:
        """Whether there are pictures enough for a KID, of the data and of generated ones."""
        return min(len(question.subjects[0].photos[0]), len(question.prompts)) >= LEAST

    def _too_few(self) -> list[str]:
        """What is said in place of a KID; of several concepts of the first that has too few."""
        for question in self.asked.alone:
            if not self._enough(question):
                own = len(question.subjects[0].photos[0])
                return [
                    f"no KID: it is mostly chance with fewer than {LEAST} pictures on a side, and "
                    f"there are {own} in the data and {len(question.prompts)} generated (images=)"
                ]
        return []

    def _beside(self, model: Backbone, question: PromptGroup) -> Scores:
        """The shares of pictures that show the concept, and that show the known sprite their
        prompt names beside it."""
        pictures, sprite = self._sample(model, question.prompts), question.subjects[0].sprite
        seen = self._reader.found(pictures, ALL).top(2)
        others = [_sprite_in(prompt) for prompt in question.prompts]
        scores: Scores = {
            "concept beside another": share(sprite in pair for pair in seen),
            "the other beside it": share(
                word in pair for word, pair in zip(others, seen, strict=True)
            ),
        }
        if self.truth is not None and sprite is not None:
            scores |= self.truth.pair(pictures, sprite, others)
        return scores

    def _together(self, model: Backbone, question: PromptGroup) -> float:
        """The share of pictures that show both concepts of their prompt."""
        seen = self._reader.found(self._sample(model, question.prompts), ALL).top(2)
        both = {subject.sprite for subject in question.subjects}
        return share(both == set(pair) for pair in seen)

    def _concept_accuracy(
        self, subject: Subject, pictures: Tensor, seen: Features | None = None
    ) -> float | None:
        """The share of pictures that a judge recognises as the concept. seen: their features, where
        they are known.

        A sprite must be named among all sprites. A picture of a photographed concept must be nearer
        to the mean embedding of its photos than to those of the class images and of the other
        concepts' photos, by the first judge; None where there is nothing to compare it with.
        """
        named = self.reader is not None and self.reader.names_patches
        if subject.sprite is not None and named:
            return share_named(self._reader.named(pictures, ALL), [subject.sprite] * len(pictures))
        rest = [other.photos[0] for other in self.asked.subjects if other is not subject]
        rest += [] if subject.others is None else [subject.others[0]]
        if not rest:
            return None
        centres = torch.stack(
            [F.normalize(photos, dim=-1).mean(0) for photos in (subject.photos[0], *rest)]
        )
        own = self.judges[0].features(pictures) if seen is None else seen[0]
        nearest = (F.normalize(own, dim=-1) @ centres.T).argmax(1)
        return share((nearest == 0).tolist())

    def _seen(self, pictures: Tensor) -> list[Tensor]:
        return [judge.features(pictures) for judge in self.judges]

    def clips(
        self,
        model: Backbone,
        prompts: Sequence[str],
        *,
        frames: int,
        fps: float | None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """One clip for each prompt, (n, frames, 3, H, W). inputs: as of `PictureMaker.make`."""
        pictures = self.maker.make(model, prompts, frames=frames, fps=fps, inputs=inputs)
        return pictures.unflatten(0, (-1, frames))

    def finish(self) -> None:
        """As `PictureMaker.finish`."""
        self.maker.finish()

    def _sample(self, model: Backbone, prompts: Sequence[str]) -> Tensor:
        return self.maker.make(model, prompts)


def mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is unknown (None) or there are no values. Of shares of equally
    many pictures each it is the share of all of them; of others a mean that is no share."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    found = sum(known) / len(known)
    counts = [value.count for value in known if isinstance(value, Share)]
    equal = len(counts) == len(known) and len(set(counts)) == 1
    return Share(found, sum(counts)) if equal else found


def means(listed: Sequence[Scores]) -> Scores:
    """The mean of each score of the first, over all."""
    return {name: mean([own.get(name) for own in listed]) for name in listed[0]}


def _sprite_in(prompt: str) -> str:
    found = [word for word in prompt.replace(",", " ").split() if word in KNOWN]
    if len(found) != 1:
        raise ValueError(
            f"evaluate: the prompt {prompt!r} must name one known sprite, and names "
            f"{found or 'none'}"
        )
    return found[0]
