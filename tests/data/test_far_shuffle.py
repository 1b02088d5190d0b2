"""The permutation that is calculated: a permutation, another for each key, and well mixed."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data import plan as step_plan
from trainer.data.far_shuffle import far_key, far_place
from trainer.data.plan import StepPlan


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000, 4097])
def test_every_place_is_taken_once(size: int) -> None:
    found = [far_place(place, size, far_key(0, 0, 1)) for place in range(size)]
    assert sorted(found) == list(range(size))


def test_keys_give_other_orders_that_are_mixed() -> None:
    size = 2000
    orders = [
        np.array([far_place(place, size, far_key(*key)) for place in range(size)])
        for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))
    ]
    for number, order in enumerate(orders):
        others = [*orders[:number], np.arange(size)]
        assert all(abs(np.corrcoef(order, other)[0, 1]) < 0.1 for other in others)
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.1
        # a stretch of an epoch is spread over the data as evenly as chance has it
        counts = np.bincount(order[:500] // 200, minlength=10)
        assert ((counts - 50) ** 2 / 50).sum() < 28  # chi-square, 9 degrees, 0.1 %


def test_large_groups_are_planned_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_plan, "STORED", 10)
    plan = StepPlan(((0, 7), (7, 40)), (0.25, 0.75), (1.0, 1.0), batch_size=4, seed=3)
    drawn = [slot.index for step in range(22) for slot in plan.batch(step)]
    for epoch in range(2):
        own = [index for index in drawn if index >= 7][33 * epoch : 33 * (epoch + 1)]
        assert sorted(own) == list(range(7, 40)) and own != sorted(own)


def test_a_rank_plans_its_own_part_of_very_many() -> None:
    plan = StepPlan(((0, 100_000_000),), (1.0,), (1.0,), batch_size=8192, seed=3)
    parts = [plan.local(20_000, rank, 1024) for rank in (0, 511, 1023)]
    assert [part[0].place for part in parts] == [0, 511 * 8, 1023 * 8]
    assert {len(part) for part in parts} == {8}
    assert len({slot.index for part in parts for slot in part}) == 24


def test_data_in_their_own_order_count_their_epochs() -> None:
    plan = StepPlan(((0, 3), (3, 8)), (0.5, 0.5), (0.5, 0.5), 4, seed=3, in_order=True)
    drawn = [slot.index for step in range(3) for slot in plan.batch(step)]
    assert [i for i in drawn if i % 8 < 3] == [0, 1, 2, 8, 9, 10]
    assert [i for i in drawn if i % 8 >= 3] == [3, 4, 5, 6, 7, 11]
