"""Patterns of shards: which names they stand for, and which are refused."""

from __future__ import annotations

import pytest

from trainer.data.tars.shard_names import names_of


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("x{9..10}.tar", ["x9.tar", "x10.tar"]),
        ("{b,a}-{0..1}.tar", ["b-0.tar", "b-1.tar", "a-0.tar", "a-1.tar"]),
    ],
)
def test_names_of_a_pattern(pattern: str, names: list[str]) -> None:
    assert names_of(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("{3..1}.tar", "runs backwards"),
        ("{0..999999999999}.tar", "more than 100,000"),
        ("{0..999}{0..999}.tar", "more than 100,000"),
        ("{1,1}.tar", "twice"),
        ("{a}.tar", "braces hold a range or a list"),
        ("{{0..1}.tar", "braces hold a range or a list"),
        ("0..1}.tar", "braces hold a range or a list"),
        ("{a..c}.tar", "braces hold a range or a list"),
    ],
)
def test_patterns_that_are_refused(pattern: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        names_of(pattern)
