"""How the words of two prompts are aligned, and the matrices that carry maps from one to the
other."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch

from trainer.attention.read_prompt import ReadPrompt
from trainer.ops.editing.word_tools import (
    aligned,
    changed,
    factors,
    places_of_word,
    refinement,
    replacement,
)

LENGTH = 12


def prompt(text: str, length: int = LENGTH, **many: int) -> ReadPrompt:
    """One begin, tokens one after another, one for each word unless `many` says otherwise."""
    words, tokens, place = text.split(), [], 1
    for word in words:
        count = many.get(word, 1)
        tokens.append(tuple(range(place, place + count)))
        place += count
    return ReadPrompt(text, tuple(words), tuple(tokens), length=length)


def test_a_word_takes_the_maps_of_the_one_in_its_place() -> None:
    """`A_source R`, written out for a word of two tokens replaced by one of three."""
    source, target = prompt("a tiger on ice", tiger=2), prompt("a hippo on ice", hippo=3)
    maps = torch.rand(5, LENGTH, generator=torch.Generator().manual_seed(0))
    made = maps @ replacement(source, target)
    for query, own in zip(maps, made, strict=True):
        both = query[2] + query[3]
        wanted = [query[0], query[1], both / 3, both / 3, both / 3, query[4], query[5]]
        wanted += [query[6], query[7], query[8], query[9], query[10] + query[11]]
        torch.testing.assert_close(own, torch.stack([*wanted[:11], query[10]]).index_add(
            0, torch.tensor([11]), query[11:12]
        ))  # fmt: skip
    torch.testing.assert_close(made.sum(1), maps.sum(1))  # none is lost


def test_words_of_as_many_tokens_belong_to_each_other_one_by_one() -> None:
    made = replacement(prompt("a tiger", tiger=2), prompt("a hippo", hippo=2))
    assert torch.equal(made, torch.eye(LENGTH))


def test_a_shorter_word_keeps_the_sum_of_all_maps_too() -> None:
    made = replacement(prompt("a tiger on", tiger=4), prompt("a cat on"))
    assert made[1:6, 2].tolist() == [0, 1, 1, 1, 1]
    torch.testing.assert_close(made.sum(1), torch.ones(LENGTH))
    assert made[6, 3] == 1  # `on`
    assert made[7:, 4:9].diag().tolist() == [1] * 5 and float(made[:, 9:].sum()) == 0


def test_prompts_of_different_length_are_refused_for_replacement() -> None:
    says = r"'a fox' has 2 words and the prompt 'a red fox' has 3.*give edit=refine, or prompts"
    with pytest.raises(ValueError, match=says):
        replacement(prompt("a fox"), prompt("a red fox"))


def test_a_refined_prompt_keeps_its_new_words() -> None:
    source, target = prompt("a fox on ice", fox=2), prompt("a big fox on Ice now", big=3, fox=2)
    mapping, alpha = refinement(source, target)
    # begin a  big     fox   on Ice now end ..
    assert alpha.tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1]
    from_ = {1: 1, 5: 2, 6: 3, 7: 4, 8: 5, 10: 6, 11: 7, 0: 0}
    for j in range(LENGTH):
        wanted = torch.zeros(LENGTH)
        if j in from_:
            wanted[from_[j]] = 1
        assert torch.equal(mapping[:, j], wanted)


def test_the_same_prompt_is_the_identity() -> None:
    one = prompt("a fox on a fox", fox=3)
    mapping, alpha = refinement(one, one)
    assert torch.equal(mapping, torch.eye(LENGTH)) and torch.equal(alpha, torch.ones(LENGTH))
    assert torch.equal(replacement(one, one), torch.eye(LENGTH))
    assert changed(one, one) == ([], [])


def longest(one: Sequence[str], two: Sequence[str]) -> int:
    """By trying every choice of words."""
    for count in range(min(len(one), len(two)), 0, -1):
        chosen = set(itertools.combinations(one, count))
        if chosen & set(itertools.combinations(two, count)):
            return count
    return 0


def test_the_alignment_is_a_longest_common_subsequence() -> None:
    draw = random.Random(0)
    for _ in range(60):
        one, two = ([draw.choice("abcd") for _ in range(draw.randint(0, 7))] for _ in range(2))
        pairs = aligned(one, two)
        assert [one[i] for i, _ in pairs] == [two[j] for _, j in pairs]
        assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(pairs))
        assert len(pairs) == longest(one, two)


def test_the_words_that_changed() -> None:
    lost, new = changed(prompt("a red fox left of a tree"), prompt("a cat left of a tall tree"))
    assert (lost, new) == ([1, 2], [1, 5])


def test_factors_are_on_the_tokens_of_their_words() -> None:
    found = factors(prompt("a red fox on red", red=2), {"red": 2.5, "red fox": 0.5})
    assert found.tolist() == [1, 1, 0.5, 0.5, 0.5, 1, 2.5, 2.5, 1, 1, 1, 1]


def test_a_word_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'cat' is not in the prompt 'a fox'; its words are a, f"):
        factors(prompt("a fox"), {"cat": 2})
    with pytest.raises(ValueError, match="its words are none"):
        places_of_word(prompt(""), "cat")
