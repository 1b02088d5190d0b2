"""Which text tokens of an edit's prompt belong to which of its source's, for maps (.., n, m) over m
tokens of text.

Two prompts are aligned word by word: a longest common subsequence (`aligned`), or one word for one
(`replacement`). The tokens of no word, begin, end and padding, belong to each other in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainer.attention.read_prompt import ReadPrompt

ARTICLES = frozenset(("a", "an", "the"))  # their maps are all over the picture


def replacement(source: ReadPrompt, target: ReadPrompt) -> Tensor:
    """R (m, m) of `A_source R`, the source's maps given to the words in the same place of a prompt
    of as many: Prompt-to-Prompt, arXiv 2208.01626, section 3.2, "word swap".

    R[i, j] is 1 / c for token i of a word and each of the c tokens of the word in its place; where
    both words have as many tokens, they belong to each other one by one. Every row adds up to 1, so
    maps still do.

    Raises:
        ValueError: the prompts have different numbers of words.
    """
    if len(source.words) != len(target.words):
        raise ValueError(
            f"the source prompt {source.text!r} has {len(source.words)} words and the prompt "
            f"{target.text!r} has {len(target.words)}: to replace words, both need as many; give "
            "edit=refine, or prompts of one length"
        )
    found = torch.zeros(source.length, target.length)
    for own, other in zip(source.tokens, target.tokens, strict=True):
        _join(found, own, other)
    rest, others = source.others, target.others
    for number, place in enumerate(rest):
        found[place, others[min(number, len(others) - 1)]] = 1
    return found


def _join(found: Tensor, own: Sequence[int], other: Sequence[int]) -> None:
    """Sets what the tokens of one word give to those of another."""
    if len(own) == len(other):
        for i, j in zip(own, other, strict=True):
            found[i, j] = 1
        return
    for i in own:
        for j in other:
            found[i, j] = 1 / len(other)


def refinement(source: ReadPrompt, target: ReadPrompt) -> tuple[Tensor, Tensor]:
    """R (m, m) and alpha (m,) of `alpha (A_source R) + (1 - alpha) A_target`, for a prompt with
    words that the source does not have: Prompt-to-Prompt, section 3.2, "adding a new phrase". The
    words of both prompts take the source's maps, alpha 1, and the others keep their own, alpha 0.
    """
    found = torch.zeros(source.length, target.length)
    pairs = list(zip(source.others, target.others, strict=False))
    for own, other in aligned(source.words, target.words):
        pairs += zip(source.tokens[own], target.tokens[other], strict=False)
    for i, j in pairs:
        found[i, j] = 1
    return found, found.sum(0)


def aligned(source: Sequence[str], target: Sequence[str]) -> list[tuple[int, int]]:
    """The numbers of equal words in a longest common subsequence of two lists of words; upper and
    lower case are the same."""
    own, other = ([word.lower() for word in words] for words in (source, target))
    longest = [[0] * (len(other) + 1) for _ in range(len(own) + 1)]  # of the rest from (i, j) on
    for i in reversed(range(len(own))):
        for j in reversed(range(len(other))):
            longest[i][j] = (
                1 + longest[i + 1][j + 1]
                if own[i] == other[j]
                else max(longest[i + 1][j], longest[i][j + 1])
            )
    pairs, i, j = [], 0, 0
    while i < len(own) and j < len(other):
        if own[i] == other[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif longest[i + 1][j] >= longest[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs


def changed(source: ReadPrompt, target: ReadPrompt) -> tuple[list[int], list[int]]:
    """The numbers of the words of each prompt that the other does not have in their place."""
    pairs = aligned(source.words, target.words)
    kept = {own for own, _ in pairs}, {other for _, other in pairs}
    lost = [number for number in range(len(source.words)) if number not in kept[0]]
    new = [number for number in range(len(target.words)) if number not in kept[1]]
    return lost, new


def factors(target: ReadPrompt, weights: Mapping[str, float]) -> Tensor:
    """(m,) the factor on the maps of each token, 1 but for those of the words in `weights`:
    Prompt-to-Prompt, section 3.2, "attention re-weighting".

    Raises:
        ValueError: a word is not in the prompt.
    """
    found = torch.ones(target.length)
    for word, weight in weights.items():
        found[places_of_word(target, word)] = weight
    return found


def places_of_word(prompt: ReadPrompt, phrase: str) -> list[int]:
    """The places of the tokens of a word, or of several words one after another, in a prompt.

    Raises:
        ValueError: they are not in the prompt.
    """
    numbers = prompt.find(phrase)
    if not numbers:
        raise ValueError(
            f"the word {phrase!r} is not in the prompt {prompt.text!r}; its words are "
            f"{', '.join(prompt.words) or 'none'}"
        )
    return prompt.places(numbers)


def word_columns(
    source: ReadPrompt, target: ReadPrompt, words: Sequence[str] | None
) -> tuple[Tensor, Tensor]:
    """(m,) of a source's prompt and of its edit's, 1 for the tokens of words, of which each is in
    one of them at least; None for the words that differ, without articles.

    Raises:
        ValueError: a word is in neither prompt.
    """
    both = torch.zeros(source.length), torch.zeros(target.length)
    if words is None:
        for prompt, numbers, columns in zip(
            (source, target), changed(source, target), both, strict=True
        ):
            own = [n for n in numbers if prompt.words[n].lower() not in ARTICLES]
            columns[prompt.places(own)] = 1
    for word in words or ():
        there = [prompt.find(word) != [] for prompt in (source, target)]
        if not any(there):
            places_of_word(target, word)  # raises, naming its words
        for prompt, has, columns in zip((source, target), there, both, strict=True):
            if has:
                columns[places_of_word(prompt, word)] = 1
    return both
