"""What of a prompt a backbone reads. Importing this imports neither torch nor transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.common.added_words import single_word

UNLIMITED = 10**30  # as transformers has it
MOST = 10**9  # more tokens than this are no limit


@dataclass(frozen=True)
class PromptReader:
    """How a text encoder reads prompts.

    ids: the tokens of a text, without those of its begin and end. read: how many of them are read.
    chunk: how many one call of the text encoder takes; with `read` they are divided into chunks,
    each with a begin and an end. added: words that are one token of their own. refusal: why a text
    cannot be read at all, None where it can; a backbone that is told classes has it, and none of
    the tokens.
    """

    ids: Callable[[str], Sequence[int]]
    read: int
    chunk: int
    added: Collection[str] = ()
    refusal: Callable[[str], str | None] | None = None

    def refused(self, text: str) -> str | None:
        """Why a text cannot be read at all; None where it can."""
        return None if self.refusal is None else self.refusal(text)

    def holds(self, text: str, word: str) -> str | None:
        """Why a text encoder does not read `word` in a text; None where it does."""
        inside = r"(?<!\w){}(?!\w)" if single_word(word) else "{}"
        if not re.search(inside.format(re.escape(word)), text, re.IGNORECASE):
            if word.lower() in text.lower():
                return f"has {word} only inside another word"
            return f"must contain the token {word}"
        ids = list(self.ids(text))
        # tokenizers of bytes have other tokens for a word at the start of a text than inside one
        forms = [list(self.ids(form)) for form in (word, f" {word}")]
        ends = [
            i + len(own) for own in forms for i in range(len(ids)) if ids[i : i + len(own)] == own
        ]
        if not ends:
            return f"has {word}, which is no word of its own there"
        if min(ends) > self.read:
            return (
                f"is {len(ids)} tokens long, of which {self.read} are read, and {word} is beyond "
                f"them; move it forward, or give text.max_tokens={self.enough(len(ids))}"
            )
        return None

    def enough(self, count: int) -> int:
        """The smallest text.max_tokens that reads so many tokens."""
        return -(-count // self.chunk) * self.chunk


def length_in(value: Any) -> int | None:
    """A number of tokens as files have it, some of them as text; None for one that is no limit."""
    try:
        found = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if 0 < found < MOST else None
