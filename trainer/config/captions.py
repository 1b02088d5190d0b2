"""Counts what the text encoder reads of a recipe's captions and prompts: a new word that it does
not read would not train, however long the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from trainer.backbones.prompt_reader import PromptReader
from trainer.backbones.prompt_tokens import prompt_reader
from trainer.config.schema import Recipe, RecipeError
from trainer.data.source import Caption
from trainer.data.tags import FIXED, Tags, farthest

SHOWN = 3  # captions that a message names


@dataclass
class Counted:
    """What was found in captions. holding: of each word, how many hold it; long: the names of those
    that are not read to their end, and their tokens; longest: tokens of the longest; wrong: a
    sentence for each that does not hold the word it should."""

    captions: int = 0
    longest: int = 0
    holding: dict[str, int] = field(default_factory=dict)
    long: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Trained:
    """The words that a recipe trains.

    new: added to the vocabulary; a caption that is of no word of its own may hold any or none of
    them, but not where it is not read. known: of the vocabulary. learned: of both, those whose
    meaning is learned from nothing but captions. needed: those that some caption must hold. tags:
    how captions vary.
    """

    new: Sequence[str]
    known: Sequence[str] = ()
    learned: Sequence[str] = ()
    needed: Sequence[str] = ()
    tags: Tags = FIXED


def trained_of(recipe: Recipe) -> Trained:
    """The words that a recipe trains with its captions. A run that goes on from another one may
    have words of it that no caption holds."""
    data, learned = recipe.data, list[str]()
    new, known = list(data.words), list[str]()
    for name, method in recipe.methods.items():
        new += method.words
        known += method.known_words
        if name not in recipe.optim.frozen and recipe.run.start_from is None:
            learned += [*(method.trained_words or method.words), *method.known_words]
    tags = Tags(getattr(data, "shuffle_tags", False), getattr(data, "keep_tags", 0))
    return Trained(
        list(dict.fromkeys(new)),
        known=list(dict.fromkeys(known)),
        learned=list(dict.fromkeys(learned)),
        needed=list(dict.fromkeys([*data.words, *learned])),
        tags=tags,
    )


def count_captions(captions: Iterable[Caption], words: Trained, reader: PromptReader) -> Counted:
    """Counts captions, and the words they hold."""
    found = Counted()
    for name, text, token in captions:
        if reason := reader.refused(text):
            found.wrong.append(f"{name}: the caption {text!r} {reason}")
            continue
        length = len(reader.ids(text))
        found.captions += 1
        found.longest = max(found.longest, length)
        if length > reader.read:
            found.long[name] = length
        for word in [word for word in words.new if word == token or word in text]:
            if (reason := _lost(text, word, words.tags, reader=reader)) is None:
                found.holding[word] = found.holding.get(word, 0) + 1
            else:
                found.wrong.append(f"{name}: the caption {reason}")
        for word in words.known:
            found.holding[word] = found.holding.get(word, 0) + (reader.holds(text, word) is None)
    return found


def _lost(text: str, word: str, tags: Tags, *, reader: PromptReader) -> str | None:
    """Why a caption does not hold a word, in the order it has or may get; None where it does."""
    if reason := reader.holds(text, word):
        return reason
    other = farthest(text, word, tags)
    if other == text or (reason := reader.holds(other, word)) is None:
        return None
    return f"{reason}, where data.shuffle_tags puts it last; data.keep_tags keeps it in front"


def check_counted(found: Counted, words: Iterable[str]) -> None:
    """Raises RecipeError where a word would not train with some caption, or with none."""
    if found.wrong:
        more = len(found.wrong) - SHOWN
        raise RecipeError(
            "; ".join(found.wrong[:SHOWN]) + (f"; and {more} more captions" if more > 0 else "")
        )
    lacking = [word for word in words if found.captions and not found.holding.get(word)]
    if lacking:
        raise RecipeError(
            f"{lacking[0]} is in none of {found.captions} captions, so nothing would train it; "
            "write it into those of the photos that show it"
        )


def said_of(found: Counted, reader: PromptReader) -> list[str]:
    """Sentences for a user: how many captions hold each word, and which are too long."""
    if not found.captions:
        return []
    if reader.refusal is not None:
        return [f"captions: {found.captions}, each a class"]
    counts = "".join(f", {count} with {word}" for word, count in found.holding.items())
    said = [f"captions: {found.captions}{counts}; the longest has {found.longest} tokens of "
            f"{reader.read} that are read"]  # fmt: skip
    if found.long:
        said.append(too_long(found.long, reader))
    return said


def too_long(long: dict[str, int], reader: PromptReader) -> str:
    """A sentence for texts, by name with their tokens, that are not read to their end."""
    shown = ", ".join(f"{name} ({count} tokens)" for name, count in list(long.items())[:SHOWN])
    more = f" and {len(long) - SHOWN} more" if len(long) > SHOWN else ""
    enough = reader.enough(max(long.values()))
    return (
        f"longer than the {reader.read} tokens that are read: {shown}{more}; "
        f"text.max_tokens={enough} reads all"
    )


def check_words(recipe: Recipe) -> list[str]:
    """Checks the captions and prompts of a recipe from the files of its backbone, and returns what
    is to be said of them; empty where those files are not on this machine, or not readable here.

    Raises:
        RecipeError: a caption or a prompt whose new word is not read.
    """
    words = trained_of(recipe)
    if recipe.objective.caption_dropout == 1 and words.learned:
        raise RecipeError(
            f"objective.caption_dropout=1 leaves no caption, so {words.learned[0]} would not "
            "train; 0.1 is usual"
        )
    added = [word for method in recipe.methods.values() for word in method.words]
    reader = prompt_reader(recipe.backbone, added)
    if reader is None:
        return []
    found = count_captions(recipe.data.captions(), words, reader)
    check_counted(found, words.needed)
    return [*said_of(found, reader), *check_prompts(recipe, reader, words.new)]


def check_read(prompt: str, key: str, words: Iterable[str], *, reader: PromptReader) -> list[str]:
    """What is to be said of a prompt that is not read to its end; RecipeError where a new word that
    it names is not read."""
    for word in words:
        if word in prompt and (reason := reader.holds(prompt, word)):
            raise RecipeError(f"{key}: {prompt!r} {reason}")
    if reason := reader.refused(prompt):
        raise RecipeError(f"{key}: {prompt!r} {reason}")
    count = len(reader.ids(prompt))
    return [too_long({f"{key}: {prompt[:40]!r}": count}, reader)] if count > reader.read else []


def check_prompts(recipe: Recipe, reader: PromptReader, words: Iterable[str]) -> list[str]:
    """What is to be said of prompts that are too long; RecipeError where one names a new word that
    is not read."""
    preview, asked = recipe.preview, recipe.evaluate
    keys = {
        "preview.prompts": preview.prompts,
        "preview.negative": (preview.negative,),
        "evaluate.alone": asked.alone,
        "evaluate.beside": asked.beside,
        "evaluate.negative": (asked.negative,),
    }
    return [
        line
        for key, prompts in keys.items()
        for prompt in prompts
        for line in check_read(prompt, key, words, reader=reader)
    ]
