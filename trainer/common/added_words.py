"""Words that are added to a vocabulary, one token each."""

from __future__ import annotations


def single_word(token: str) -> bool:
    """Whether a token is recognised only as a word of its own: one like `sks` must not split
    `asks`, and one like `<v1>` is recognised anywhere."""
    return token[0].isalnum() or token[-1].isalnum()
