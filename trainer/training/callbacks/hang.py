"""Ends a run that hangs, and prints the stacks of all threads; the job can then start again.

Each section of the loop has its own time limit, counted from the start of the batch.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import lightning

from trainer.common.exit_codes import HUNG

# seconds; a rank that waits for another one's save is in the section "save", too
LIMITS = {"data": 600.0, "step": 1800.0, "validate": 1800.0, "save": 1800.0, "preview": 1800.0}
TRAINING = ("data", "step")


class HangGuard(lightning.Callback):
    """Ends the process when a section takes longer than its limit.

    limits: seconds by section, in place of those in `LIMITS`; 0 for no limit. folder: where
    `hang-<rank>.txt` is written; the same text goes to stderr. It must be the last callback, so
    that the work of the others counts as part of the step.
    """

    def __init__(self, limits: Mapping[str, float], folder: Path) -> None:
        self.limits, self.folder = {**LIMITS, **limits}, folder
        self.now = ("data", time.monotonic())  # the section, and since when
        self._spent = dict.fromkeys(TRAINING, 0.0)  # seconds in these, when they were left
        self._ended: threading.Event | None = None

    def enter(self, section: str) -> None:
        """Starts the clock of a section."""
        before, _ = self.now
        if before in TRAINING:
            self._spent[before] = self.spent(before)
        self.now = (section, time.monotonic())

    def trained(self) -> float:
        """The seconds that batches and steps have taken until now, without validation, saves and
        previews."""
        return sum(map(self.spent, TRAINING))

    def spent(self, section: str) -> float:
        """The seconds in one of `TRAINING` until now."""
        now, since = self.now
        present = time.monotonic() - since if now == section else 0.0
        return self._spent[section] + present

    @contextmanager
    def inside(self, section: str) -> Iterator[None]:
        """A section inside another one; the clock of the outer section starts again after it."""
        before, _ = self.now
        self.enter(section)
        try:
            yield
        finally:
            self.enter(before)

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.enter("data")
        self._ended = threading.Event()
        watch = threading.Thread(target=self._watch, args=(trainer, self._ended), daemon=True)
        watch.start()

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self.enter("step")

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.enter("data")

    def on_validation_start(self, *_: Any, **__: Any) -> None:
        self.enter("validate")

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.enter("validate")

    def on_validation_end(self, *_: Any, **__: Any) -> None:
        self.enter("data")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._end()

    def on_exception(self, *_: Any, **__: Any) -> None:
        self._end()

    def _end(self) -> None:
        if self._ended is not None:
            self._ended.set()

    def _watch(self, trainer: lightning.Trainer, ended: threading.Event) -> None:
        limits = [limit for limit in self.limits.values() if limit]
        if not limits:
            return
        while not ended.wait(min(1.0, min(limits) / 4)):
            section, since = self.now
            limit = self.limits[section]
            if limit and time.monotonic() - since > limit:
                self._give_up(trainer, section, limit)

    def _give_up(self, trainer: lightning.Trainer, section: str, limit: float) -> None:
        place = self.folder / f"hang-{trainer.global_rank}.txt"
        text = (
            f"rank {trainer.global_rank} has been in section {section!r} for more than "
            f"run.timeouts.{section}={limit:g} seconds, at step {trainer.global_step}; the last "
            f"checkpoint is kept. Stacks, also in {place}:\n"
        )
        with place.open("w", encoding="utf-8") as file:
            for stream in (file, sys.__stderr__ or file):
                stream.write(text)
                stream.flush()
                faulthandler.dump_traceback(stream)
        if (launcher := trainer.strategy.launcher) is not None:
            launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows has no SIGKILL
        vanish(HUNG)


def vanish(code: int) -> NoReturn:
    """Ends this process and its data workers at once, without Python's work at exit, which could
    wait for other processes."""
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stderr.flush()
    os._exit(code)
