"""Intervals of shares: Wilson's score against its definition, and where tables print them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import copy, deepcopy
from math import sqrt

import pytest

from trainer.evaluation.examiner import mean
from trainer.evaluation.score_table import score_text
from trainer.evaluation.shares import Share, percent, share, wilson


@pytest.mark.parametrize(("hits", "count"), [(0, 32), (1, 7), (31, 32), (58, 64), (64, 64)])
def test_the_ends_are_shares_that_what_was_seen_is_just_compatible_with(
    hits: int, count: int
) -> None:
    """|seen - p| = z sqrt(p (1 - p) / n) at both ends p, but for one cut off at 0 or 1."""
    seen = hits / count
    for end in wilson(seen, count):
        off = abs(seen - end) / sqrt(end * (1 - end) / count) if 0 < end < 1 else None
        assert off is None or off == pytest.approx(1.959963985, rel=1e-6)
    low, high = wilson(seen, count)
    assert 0 <= low <= seen <= high <= 1
    assert (low == 0) == (hits == 0) and (high == pytest.approx(1)) == (hits == count)


def test_known_values() -> None:
    """scipy.stats.binomtest(58, 64).proportion_ci(method='wilson'), and of 0 of 32."""
    assert wilson(58 / 64, 64) == pytest.approx((0.810171204, 0.956321747), abs=1e-8)
    assert wilson(0.0, 32) == pytest.approx((0, 0.107179198), abs=1e-8)


def test_a_share_knows_its_pictures_and_counts_as_a_number() -> None:
    found = share([True] * 31 + [False])
    assert found == 31 / 32 and found.count == 32 and found.interval == wilson(31 / 32, 32)
    assert 100 * found == pytest.approx(96.875)


def test_a_table_prints_the_interval_where_it_is_known() -> None:
    assert score_text("concept accuracy", Share(58 / 64, 64)) == "90.6 % (81.0 to 95.6)"
    assert score_text("CLIP-T", 0.25) == "0.25"
    assert percent(0.5) == "50.0 %"
    assert percent(None) == "-"


def test_the_mean_of_equal_groups_is_the_share_of_all() -> None:
    found = mean([Share(0.5, 32), Share(1.0, 32)])
    assert isinstance(found, Share) and found == 0.75 and found.count == 64
    assert not isinstance(mean([Share(0.5, 32), 0.25]), Share)
    assert mean([Share(0.5, 32), None]) is None


def test_the_mean_of_unequal_groups_is_no_share() -> None:
    """0.75 is not the share of 40 pictures of which 24 are right."""
    found = mean([Share(0.5, 32), Share(1.0, 8)])
    assert found == 0.75 and not isinstance(found, Share)


@pytest.mark.parametrize("again", [copy, deepcopy, lambda own: pickle.loads(pickle.dumps(own))])
def test_a_share_is_copied_with_its_count(again: Callable[[Share], Share]) -> None:
    found = again(Share(0.5, 32))
    assert isinstance(found, Share) and found == 0.5 and found.count == 32
