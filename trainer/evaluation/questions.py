"""What an evaluation asks of a model: the concepts that a run has learned, and the prompts of each
kind of picture. What a run has not learned is not asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from trainer.common.articles import article_of
from trainer.config.schema import Recipe
from trainer.config.sections import EvaluateSpec
from trainer.data.caption_templates import CLASS_PROMPTS, fill
from trainer.data.concept_photos import OneConcept
from trainer.data.source import Dataset
from trainer.data.world.scenes import article
from trainer.data.world.sprites import KNOWN
from trainer.evaluation.open_judges import PictureJudge, reader_of

REAL = 256  # pictures of data without a concept that generated ones are compared with, at most
READ = 16  # pictures of the data in memory at once
CLASS_IMAGES = 32  # class images that a photographed concept is told from, at most


@dataclass(frozen=True)
class Subject:
    """What pictures are compared with: one learned concept, or all pictures of the data.

    photos: each judge's features (n, d) of its training pictures; token: the trained token, empty
    without a concept; word: a plain word for the concept; kind: its class word; sprite: the sprite
    it shows, None for photographs; others: each judge's features of class images of its kind.
    """

    photos: tuple[Tensor, ...]
    token: str = ""
    word: str | None = None
    kind: str | None = None
    sprite: str | None = None
    others: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class PromptGroup:
    """Prompts, one for each picture, and the concepts that they name. texts: the prompts as a judge
    reads them, with plain words for new ones; None where there is no plain word."""

    prompts: list[str]
    subjects: tuple[Subject, ...] = ()
    texts: list[str] | None = None


@dataclass(frozen=True)
class Questions:
    """All that one model is asked for. alone: each concept by itself, or data without a concept by
    their captions; plain: other things of each concept's kind, in the order of `alone`; beside: a
    concept beside a known sprite; together: two concepts; known: known sprites. notes: what is not
    asked for, and why."""

    alone: list[PromptGroup] = field(default_factory=list)
    plain: list[PromptGroup] = field(default_factory=list)
    beside: list[PromptGroup] = field(default_factory=list)
    together: list[PromptGroup] = field(default_factory=list)
    known: list[PromptGroup] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def pictures(self) -> int:
        """How many pictures a model generates."""
        every = (self.alone, self.plain, self.beside, self.together, self.known)
        return sum(len(each.prompts) for group in every for each in group)

    @property
    def subjects(self) -> list[Subject]:
        """The learned concepts; empty for data without one."""
        return [each.subjects[0] for each in self.alone if each.subjects[0].token]


def ask(
    recipe: Recipe,
    judges: Sequence[PictureJudge],
    train: Dataset,
    *,
    held_out: Dataset | None,
    count: int,
) -> Questions:
    """What a run's model is asked for, by its recipe and data. Clips have questions of their own,
    see `clip_scores.py`.

    train: concepts' photos first and class images last; count: pictures for each kind of prompt.
    """
    reader = reader_of(judges)
    sprites = reader is not None and reader.names_patches
    known = _known(recipe.evaluate) if sprites else []
    if max(train.frames) > 1:
        return Questions(known=known)
    learned: list[OneConcept] = list(getattr(recipe.data, "concepts", ()))
    if not learned:
        alone, notes = _of_captions(recipe, judges, train, held_out=held_out, count=count)
        return Questions(alone=alone, known=known, notes=notes)
    groups = [list(group) for group in train.groups]
    prior = [row for group in groups[len(learned) :] for row in group]
    subjects = [
        _subject(
            each, _features(judges, train, rows), others=_of_kind(each, judges, train, prior=prior)
        )
        for each, rows in zip(learned, groups, strict=False)
    ]
    asked = _of_concepts(recipe.evaluate, subjects, count)
    if not (sprites and all(subject.sprite for subject in subjects)):
        asked = replace(asked, beside=[], together=[])
    notes = tuple(_notes(recipe.evaluate, subjects, bool(prior)))
    return replace(asked, known=known, notes=notes)


def _of_concepts(asked: EvaluateSpec, subjects: Sequence[Subject], count: int) -> Questions:
    """Each concept alone, its kind, it beside a known sprite, and every two of them."""
    return Questions(
        alone=[_alone(asked, subjects, number, count=count) for number in range(len(subjects))]
        if asked.alone
        else [],
        plain=[_plain(each, count) for each in subjects] if asked.alone else [],
        beside=[
            PromptGroup(in_turn(rewritten(asked.beside, subjects, each), count), (each,))
            for each in subjects
            if asked.beside
        ],
        together=[
            PromptGroup(in_turn(_both(asked.together, *pair), count), pair)
            for pair in combinations(subjects, 2)
            if asked.together
        ],
    )


def in_turn(prompts: Sequence[str], count: int) -> list[str]:
    """`count` prompts, those given one after another and again."""
    return [prompts[i % len(prompts)] for i in range(count)] if prompts else []


def rewritten(prompts: Sequence[str], subjects: Sequence[Subject], own: Subject) -> list[str]:
    """A recipe's prompts, which name the first concept, for another one of its concepts."""
    first = subjects[0]
    if own is first:
        return list(prompts)
    whole = own.token if own.kind is None else f"{own.token} {own.kind}"
    return [_renamed(prompt, first, whole=whole, bare=own.token) for prompt in prompts]


def _renamed(prompt: str, subject: Subject, *, whole: str, bare: str) -> str:
    """A prompt with another name for the subject: `whole` in place of its token and its kind or
    word, `bare` in place of the token alone, with the article that belongs before it."""
    tails = [re.escape(each) for each in (subject.kind, subject.word) if each]
    tail = rf"(\s+(?:{'|'.join(tails)})\b)?" if tails else "()"

    def put(found: re.Match[str]) -> str:
        name = whole if found[2] else bare
        if not found[1]:
            return name
        before = article_of(name)
        return f"{before.capitalize() if found[1][0] == 'A' else before} {name}"

    return re.sub(rf"(\b[Aa]n?\s+)?{re.escape(subject.token)}{tail}", put, prompt)


def _of_kind(
    concept: OneConcept, judges: Sequence[PictureJudge], train: Dataset, *, prior: Sequence[int]
) -> tuple[Tensor, ...] | None:
    """The judges' features of class images whose captions name the concept's kind, of any where
    none does; None without class images."""
    if not prior:
        return None
    rng, kind = np.random.default_rng(0), concept.kind
    own = [row for row in prior if kind is not None and kind in train.caption(row, rng)]
    rows = own or list(prior)
    return _features(judges, train, [rows[i] for i in evenly(len(rows), CLASS_IMAGES)])


def _subject(
    concept: OneConcept, photos: tuple[Tensor, ...], others: tuple[Tensor, ...] | None
) -> Subject:
    return Subject(
        others=others,
        token=concept.token,
        word=concept.sprite or concept.kind,
        kind=concept.kind,
        sprite=concept.sprite,
        photos=photos,
    )


def _alone(
    asked: EvaluateSpec, subjects: Sequence[Subject], number: int, *, count: int
) -> PromptGroup:
    own = subjects[number]
    prompts, word = in_turn(rewritten(asked.alone, subjects, own), count), own.word
    if word is None:
        return PromptGroup(prompts, (own,))
    texts = [_renamed(prompt, own, whole=word, bare=word) for prompt in prompts]
    return PromptGroup(prompts, (own,), texts)


def _plain(own: Subject, count: int) -> PromptGroup:
    """Of things of the concept's kind; nothing where its kind is not said."""
    own_prompts = [] if own.kind is None else [fill(text, None, own.kind) for text in CLASS_PROMPTS]
    return PromptGroup(in_turn(own_prompts, count), (own,))


def _both(prompts: Sequence[str], one: Subject, other: Subject) -> list[str]:
    return [prompt.replace("{}", one.token, 1).replace("{}", other.token, 1) for prompt in prompts]


def _known(asked: EvaluateSpec) -> list[PromptGroup]:
    prompts = [text.replace("{}", article(word)) for text in asked.known for word in KNOWN]
    return [PromptGroup(prompts)] if prompts else []


def _of_captions(
    recipe: Recipe,
    judges: Sequence[PictureJudge],
    train: Dataset,
    *,
    held_out: Dataset | None,
    count: int,
) -> tuple[list[PromptGroup], tuple[str, ...]]:
    """One question by the prompts of a recipe that gives some, else by captions that were not
    trained on, else by those that were."""
    given = (recipe.tree.get("evaluate") or {}).get("alone")
    prompts, notes = list(recipe.evaluate.alone) if given else [], []
    if not prompts and given != []:
        own = train if held_out is None else held_out
        rng = np.random.default_rng(0)
        captions = [own.caption(row, rng) for row in evenly(len(own), count)]
        prompts = [caption for caption in captions if caption.strip()]
        if held_out is None:
            notes.append(
                "the prompts are captions that were trained on, since data.validation holds no "
                "pictures out"
            )
    if not prompts:
        return [], ("nothing is asked for: there are no captions; give prompts as evaluate.alone",)
    prompts, rows = in_turn(prompts, count), evenly(len(train), REAL)
    new = [word for method in recipe.methods.values() for word in method.words]
    strange = [word for word in new if any(word in prompt for prompt in prompts)]
    if strange:
        notes.append(f"no CLIP-T: the prompts hold {strange[0]}, a word that no judge knows")
    data = Subject(photos=_features(judges, train, rows))
    return [PromptGroup(prompts, (data,), None if strange else prompts)], tuple(notes)


def evenly(total: int, count: int) -> list[int]:
    """At most `count` of the numbers below `total`, evenly spaced."""
    least = min(total, count)
    return [number * total // least for number in range(least)]


def _features(
    judges: Sequence[PictureJudge], data: Dataset, rows: Sequence[int]
) -> tuple[Tensor, ...]:
    """Each judge's features of some pictures, which may be of several sizes."""
    parts = []
    for first in range(0, len(rows), READ):
        pictures = [data.image(row) for row in rows[first : first + READ]]
        parts.append([judge.features(pictures) for judge in judges])
    return tuple(torch.cat(own) for own in zip(*parts, strict=True))


def _notes(asked: EvaluateSpec, subjects: Sequence[Subject], has_others: bool) -> list[str]:
    """What is not asked for of concepts, and what it would need."""
    if not asked.alone:
        return []
    found = []
    photographed = [each for each in subjects if each.sprite is None]
    if [each for each in photographed if each.word is None]:
        found.append(
            "no CLIP-T, PRES and prior drift: without data.class_word no text says what "
            "the pictures should show"
        )
    if photographed and len(subjects) == 1 and not has_others:
        found.append(
            "no concept accuracy: there are no class images to tell the concept from "
            "(data.prior_weight above 0)"
        )
    return found
