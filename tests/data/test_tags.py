"""Which caption a step uses, and in which order its tags."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from trainer.data.tags import Tags, drawn, shuffled


def test_one_caption_draws_nothing() -> None:
    rng = np.random.default_rng(0)
    assert drawn(("a, b",), rng) == "a, b"
    assert rng.random() == np.random.default_rng(0).random()


def test_each_of_several_is_drawn_as_often() -> None:
    rng = np.random.default_rng(0)
    counts = Counter(drawn(("a", "b", "c"), rng) for _ in range(3000))
    assert set(counts) == {"a", "b", "c"} and min(counts.values()) > 900


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_tags_behind_the_first_change_places(keep: int) -> None:
    seen = {shuffled("a,b , c,, d", keep, np.random.default_rng(n)) for n in range(200)}
    rest = 4 - keep
    assert len(seen) == {4: 24, 3: 6, 2: 2}[rest]
    for text in seen:
        assert text.split(", ")[:keep] == ["a", "b", "c", "d"][:keep]
        assert sorted(text.split(", ")) == ["a", "b", "c", "d"]


def test_what_cannot_change_stays_as_it_is_written() -> None:
    rng = np.random.default_rng(0)
    assert shuffled("a,  b", 1, rng) == "a,  b"
    assert shuffled("a dog  on grass", 0, rng) == "a dog  on grass"
    assert rng.random() == np.random.default_rng(0).random()


def test_the_same_random_numbers_give_the_same_caption() -> None:
    def one(seed: int) -> str:
        rng = np.random.default_rng(seed)
        return drawn(("a, b, c", "d, e, f"), rng, Tags(shuffle=True, keep=1))

    found = [one(seed) for seed in range(50)]
    assert found == [one(seed) for seed in range(50)]
    assert set(found) == {"a, b, c", "a, c, b", "d, e, f", "d, f, e"}
