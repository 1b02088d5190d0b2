"""A tracker that raises, hangs or is slow: the run neither ends nor waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from trainer.training.trackers import steady as steady_file
from trainer.training.trackers.steady import InBackground, Steady
from trainer.training.trackers.tracker import Tracker

SOON = 5.0  # seconds that a thread may take here


class Told:
    """A tracker that notes what it is told, after `act`."""

    def __init__(self, act: Callable[[], Any] = lambda: None) -> None:
        self.act, self.told = act, list[Any]()
        self.thread: threading.Thread | None = None

    @property
    def experiment(self) -> None:
        self._note("opened")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._note((step, metrics))

    def log_settings(self, settings: Any, metrics: Any) -> None:
        self._note(("settings", dict(settings)))

    def log_pictures(self, name: str, pictures: Any, *, prompts: Any, step: int) -> None:
        self._note((name, len(pictures), step))

    def log_clip(self, name: str, files: Any, *, step: int) -> None:
        self._note((name, list(files), step))

    def save(self) -> None:
        pass

    def finalize(self, status: str) -> None:
        self._note(status)

    def _note(self, what: Any) -> None:
        self.thread = threading.current_thread()
        self.act()
        self.told.append(what)


def broken() -> None:
    raise MemoryError


def background(
    *trackers: Tracker, late: Callable[[int, bool], None] = lambda *_: None, leave: float = SOON
) -> InBackground:
    return InBackground(Steady(trackers, lambda *_: None), late, leave=leave)


def test_it_is_told_everything_in_order_in_another_thread() -> None:
    own = Told()
    loop = background(own)
    assert loop.experiment is None
    loop.log_settings({"a": 1}, [])
    for step in range(3):
        loop.log_metrics({"loss": 0.5}, step)
    loop.log_pictures("preview", [Image.new("RGB", (2, 2))], prompts=["a"], step=3)
    loop.log_clip("clip", [], step=4)
    loop.finalize("success")
    loop.finalize("failed")  # Lightning may end it twice
    loop.log_metrics({"loss": 0.5}, 9)
    lines = [(step, {"loss": 0.5}) for step in range(3)]
    assert own.told == [
        "opened", ("settings", {"a": 1}), *lines, ("preview", 1, 3), ("clip", [], 4), "success"
    ]  # fmt: skip
    assert own.thread is not None and own.thread is not threading.current_thread()


def test_a_tracker_that_raises_is_followed_by_the_next() -> None:
    told: list[str] = []

    def failed(tracker: Tracker, error: Exception) -> None:
        told.append(type(error).__name__)
        raise BrokenPipeError  # what ends a broken tracker may be broken, too

    last = Told()
    loop = InBackground(Steady([Told(broken), last], failed), lambda *_: None)
    loop.log_metrics({"loss": 1.0}, 1)
    loop.finalize("success")
    assert told == ["MemoryError"] and last.told == [(1, {"loss": 1.0}), "success"]


def test_a_run_goes_on_without_any_tracker() -> None:
    told: list[str] = []
    steady = Steady([Told(broken)], lambda _, error: told.append(type(error).__name__))
    loop = InBackground(steady, lambda *_: None)
    for step in range(3):
        loop.log_metrics({"loss": 1.0}, step)
    loop.finalize("success")
    assert told == ["MemoryError"] and steady.trackers == []


def test_a_slow_tracker_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps at each line: the run tells it in no time, and what is too much is counted."""
    monkeypatch.setattr(steady_file, "WAITING", 5)
    late: list[tuple[int, bool]] = []
    own = Told(lambda: time.sleep(0.02))
    loop = background(own, late=lambda *told: late.append(told))
    began = time.monotonic()
    for step in range(200):
        loop.log_metrics({"loss": 1.0}, step)
    assert time.monotonic() - began < 0.02 * 20
    loop.finalize("success")
    ((left_out, busy),) = late
    assert len(own.told) - 1 + left_out == 200 and left_out > 100 and not busy


def test_a_hanging_tracker_is_left_behind() -> None:
    late: list[tuple[int, bool]] = []
    go = threading.Event()
    loop = background(Told(go.wait), late=lambda *told: late.append(told), leave=0.1)
    began = time.monotonic()
    for step in range(steady_file.PICTURES + 3):
        loop.log_pictures("preview", [], prompts=[], step=step)
    loop.finalize("success")
    assert time.monotonic() - began < SOON
    assert late == [(3, True)]  # pictures take memory: few of them wait
    go.set()


def test_pictures_that_were_told_make_room_for_the_next() -> None:
    own = Told()
    loop = background(own)
    for step in range(3 * steady_file.PICTURES):
        loop.log_pictures("preview", [], prompts=[], step=step)
        until = time.monotonic() + SOON
        while len(own.told) <= step and time.monotonic() < until:
            time.sleep(0.001)
    loop.finalize("success")
    assert len(own.told) == 3 * steady_file.PICTURES + 1 and loop.left_out == 0
