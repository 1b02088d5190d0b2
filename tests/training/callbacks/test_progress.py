"""The line that a run prints where there is no terminal: step, loss, speed and time left."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from trainer.training.callbacks import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which a test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def state(step: int, **metrics: float) -> Any:
    return SimpleNamespace(
        global_step=step, max_steps=50, is_global_zero=True, callback_metrics=metrics
    )


def test_a_line_every_so_many_steps(clock: list[float]) -> None:
    said = io.StringIO()
    bar = progress.Bar(6, 5, Console(file=said, width=200))
    bar.on_train_start(state(10), None)  # type: ignore[arg-type]
    losses = {11: 1.0, 12: 3.0, 13: float("nan"), 14: 1.04, 15: 1.04}
    for step, loss in losses.items():
        clock[0] += 50 if step == 11 else 2  # the first, in which a model is compiled
        bar.on_train_batch_end(state(step, **{"train/loss": loss, "val/loss": 0.5}), None)  # type: ignore[arg-type]
        bar.on_train_batch_end(state(step, **{"train/loss": 9.0}), None)  # type: ignore[arg-type]
    smooth = 1.0
    for loss in (3.0, 1.04, 1.04):
        smooth = 0.98 * smooth + 0.02 * loss
    # 4 steps of 6 images in 8 seconds after the first, and 35 steps of 2 seconds to come
    assert said.getvalue() == (
        f"step 15/50  loss {smooth:.4f}  val 0.5000  3.0 images/s  1.2 min left\n"
    )


def test_the_last_step_has_a_line(clock: list[float]) -> None:
    said = io.StringIO()
    bar = progress.Bar(1, 1000, Console(file=said, width=200))
    bar.on_train_start(state(48), None)  # type: ignore[arg-type]
    for step in (49, 50):
        clock[0] += 1
        bar.on_train_batch_end(state(step), None)  # type: ignore[arg-type]
    assert said.getvalue() == "step 50/50  loss -  1.0 images/s  0.0 min left\n"


def test_no_minute_without_a_line(clock: list[float]) -> None:
    """Where steps are so slow that `every` of them take long."""
    said = io.StringIO()
    bar = progress.Bar(1, 1000, Console(file=said, width=200))
    bar.on_train_start(state(0), None)  # type: ignore[arg-type]
    for step in range(1, 9):
        clock[0] += 25
        bar.on_train_batch_end(state(step), None)  # type: ignore[arg-type]
    lines = [line.split("  ")[0] for line in said.getvalue().splitlines()]
    assert lines == ["step 3/50", "step 6/50"]


def test_lines_go_to_stderr() -> None:
    """stdout is for what a verb gives."""
    assert progress.Bar(1, 1).console.stderr
