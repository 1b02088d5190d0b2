"""The indefinite article of English words, which depends on their sound."""

from __future__ import annotations

import re

# words that begin with a vowel's letter and the sound of "you" or "won"
LIKE_A = re.compile(
    r"uni(?!n|m|d|ss)|u[bfkt][aeiou]|us(?!h|s)|ur(?=[aei](?:n|l|t))|eu|ew|one\b|once\b|ouija"
)
LIKE_AN = re.compile(r"hour|honest|honor|honour|heir\b|heirloom")  # a silent h
SPELLED = frozenset("AEFHILMNORSX")  # letters whose names begin with a vowel, as in "an MRI"


def article_of(words: str) -> str:
    """`a` or `an`, as it stands before `words`. Marks around a word, as in <v1>, have no sound."""
    found = re.search(r"[^\W_]+", words)
    if found is None:
        return "a"
    word = found[0]
    if word.isdigit() or word[0].isdigit():
        return "an" if re.match(r"8|(11|18)(?!\d)", word) else "a"
    if len(word) > 1 and word.isupper() and len(word) <= 4:
        return "an" if word[0] in SPELLED else "a"
    small = word.lower()
    if small[0] in "aeiou":
        return "a" if LIKE_A.match(small) else "an"
    return "an" if LIKE_AN.match(small) else "a"
