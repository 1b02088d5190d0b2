"""A tracker neither ends a run nor holds it up: it is told in a thread of its own, and left out
where it fails or takes too long."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from PIL.Image import Image

from trainer.training.console import first_rank
from trainer.training.trackers.tracker import Tracker

WAITING, PICTURES = 500, 4  # things to be told that wait, at most, and those with pictures
LEAVE = 75.0  # seconds that the end of a run waits for a tracker: more than for wandb's uploads

Act = Callable[[Any], Any]


class Steady:
    """Several trackers of which the first is used that does not fail, until none is left. failed:
    is called with the failed tracker and the exception; ended: with the tracker whose files are
    complete."""

    def __init__(
        self,
        trackers: Sequence[Tracker],
        failed: Callable[[Tracker, Exception], None],
        ended: Callable[[Tracker], None] | None = None,
    ) -> None:
        self.trackers, self.failed, self.ended = list(trackers), failed, ended

    def attempt(self, act: Act) -> None:
        """Does something with the first tracker that does not fail at it."""
        while self.trackers:
            try:
                act(self.trackers[0])
                return
            except Exception as error:
                with suppress(Exception):  # what ends a broken tracker may be broken, too
                    self.failed(self.trackers.pop(0), error)

    def finalize(self, status: str) -> None:
        def end(tracker: Tracker) -> None:
            tracker.finalize(status)
            if self.ended is not None:
                self.ended(tracker)

        self.attempt(end)


class InBackground(Logger):
    """Tells a `Steady` everything in a thread, in order; the run never waits but at its end, and
    then at most `leave` seconds. What comes while too much waits is left out.

    late: is called with how many things were left out, and whether the tracker was still busy at
    the end.
    """

    def __init__(
        self, steady: Steady, late: Callable[[int, bool], None], *, leave: float = LEAVE
    ) -> None:
        super().__init__()
        self.steady, self.late, self.leave = steady, late, leave
        self.waiting: queue.Queue[tuple[Act, bool] | None] = queue.Queue(WAITING)
        self.pictures = threading.Semaphore(PICTURES)
        self.left_out, self.ended, self.status = 0, False, "success"
        self.thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        return "trackers"

    @property
    def version(self) -> str:
        return ""

    @property
    def experiment(self) -> None:
        """Has the tracker opened, which may take a while: nobody waits for it."""
        self._tell(lambda tracker: tracker.experiment)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        def act(tracker: Tracker) -> None:
            tracker.log_metrics(metrics, step)
            tracker.save()

        self._tell(act)

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Does nothing: `log_settings` has them."""

    def log_settings(self, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
        self._tell(lambda tracker: tracker.log_settings(settings, metrics))

    def log_pictures(
        self, name: str, pictures: Sequence[Image], *, prompts: Sequence[str], step: int
    ) -> None:
        self._tell(
            lambda own: own.log_pictures(name, pictures, prompts=prompts, step=step), large=True
        )

    def log_clip(self, name: str, files: Sequence[Path], *, step: int) -> None:
        self._tell(lambda own: own.log_clip(name, files, step=step), large=True)

    def finalize(self, status: str) -> None:
        """Ends the tracker, once it has been told everything."""
        if self.ended or not first_rank():
            return
        self.ended, until = True, time.monotonic() + self.leave
        self.status = status
        if self.thread is None:  # it was told nothing
            self.steady.finalize(status)
            return
        with suppress(queue.Full):
            self.waiting.put(None, timeout=self.leave)
        self.thread.join(max(0.0, until - time.monotonic()))
        if self.thread.is_alive() or self.left_out:
            self.late(self.left_out, self.thread.is_alive())

    def _tell(self, act: Act, *, large: bool = False) -> None:
        """large: it takes much memory while it waits."""
        if self.ended or not first_rank():
            return
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name="tracker", daemon=True)
            self.thread.start()
        if large and not self.pictures.acquire(blocking=False):
            self.left_out += 1
            return
        try:
            self.waiting.put_nowait((act, large))
        except queue.Full:
            self.left_out += 1
            if large:
                self.pictures.release()

    def _work(self) -> None:
        while (told := self.waiting.get()) is not None:
            act, large = told
            self.steady.attempt(act)
            if large:
                self.pictures.release()
        self.steady.finalize(self.status)
