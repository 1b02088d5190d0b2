"""The parts of a batch, in their order, with batches that are added up or cut off."""

from __future__ import annotations

import pytest

from trainer.training import step_clock
from trainer.training.step_clock import StepClock


def test_parts_are_summed_over_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: now[0])
    clock = StepClock(cuda=False)
    clock.mark()  # before any batch
    for parts in ((1, 2, 4), (10, 20, 40), (100, 200)):  # the last one raised
        clock.begin()
        for seconds in parts:
            now[0] += seconds
            clock.mark()
        now[0] += 1000  # between batches
    assert clock.take() == {"forward": 11, "backward": 22, "optimizer": 44}
    assert clock.take() == {"forward": 0, "backward": 0, "optimizer": 0}
