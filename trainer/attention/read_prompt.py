"""A prompt as a denoiser gets it: its words, and which of the text tokens each of them is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

WORDS = re.compile(r"<[^<>\s]+>|[\w'\u2019-]+|[^\w\s]+")


@dataclass(frozen=True)
class ReadPrompt:
    """words: of the text, in order, punctuation as words of its own. tokens: of each word, the
    places of its tokens among the `length` that the denoiser gets; none of a word beyond those that
    are read."""

    text: str
    words: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    length: int

    @property
    def others(self) -> list[int]:
        """The places of no word: those of begin, end and padding, in order."""
        own = {place for places in self.tokens for place in places}
        return [place for place in range(self.length) if place not in own]

    def find(self, phrase: str) -> list[int]:
        """The numbers of the words that are a phrase of one word or several, wherever it occurs;
        none where it does not. Upper and lower case are the same, and so is any space between
        words."""
        wanted = WORDS.findall(phrase.lower())
        own = [word.lower() for word in self.words]
        starts = range(len(own) - len(wanted) + 1) if wanted else range(0)
        found = [at for at in starts if own[at : at + len(wanted)] == wanted]
        return [number for at in found for number in range(at, at + len(wanted))]

    def places(self, numbers: Sequence[int]) -> list[int]:
        """The places of the tokens of words, by their numbers.

        Raises:
            ValueError: a word has no token that is read.
        """
        for number in numbers:
            if not self.tokens[number]:
                raise ValueError(
                    f"the word {self.words[number]!r} of the prompt {self.text!r} is beyond the "
                    "tokens that are read of it; move it forward, or shorten the prompt"
                )
        return [place for number in numbers for place in self.tokens[number]]
