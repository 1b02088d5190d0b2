"""Words of several vectors: one word in a prompt stands for all of them, each its own token."""

from __future__ import annotations

import re
from collections.abc import Collection, Container
from itertools import count, takewhile


def vector_names(word: str, vectors: int) -> list[str]:
    """The tokens of a word of so many vectors: `<v1>`, `<v1>_1`, ..., as diffusers calls them."""
    return [word if number == 0 else f"{word}_{number}" for number in range(vectors)]


def following_vectors(word: str, known: Container[str]) -> list[str]:
    """The tokens of a word after the first, as far as they are known: `<v1>_1`, `<v1>_2`, ..."""
    return list(takewhile(known.__contains__, (f"{word}_{i}" for i in count(1))))


def first_vectors(words: Collection[str]) -> list[str]:
    """The words without those that are a further vector of another, as `<v1>_1` is of `<v1>`."""
    every = {own for word in words for own in following_vectors(word, words)}
    return [word for word in words if word not in every]


def with_all_vectors(prompt: str, added: Collection[str]) -> str:
    """A prompt in which every word that has several vectors is followed by the rest of them, as in
    diffusers' `maybe_convert_prompt`. Where they follow already, it stays.

    added: the words that were added to the vocabulary.
    """
    for word in added:
        if f"{word}_1" not in added or word not in prompt:
            continue
        every = " ".join((word, *following_vectors(word, added)))
        start, end = (r"\b" if letter.isalnum() else "" for letter in (word[0], word[-1]))
        own = re.escape(word)
        alone = rf"{start}{own}{end}(?!_\d)(?!\s*{own}_1)"
        prompt = re.sub(alone, every.replace("\\", r"\\"), prompt)
    return prompt
