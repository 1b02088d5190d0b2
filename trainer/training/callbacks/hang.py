"""A run that hangs ends: the stacks of all threads are printed, and the job can start again.

Each section of the loop has its own limit; the clock starts anew with every batch.
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

# seconds. Ranks that wait for another's preview or save are in a section of their own meanwhile
LIMITS = {"data": 600.0, "step": 1800.0, "validate": 1800.0, "save": 1800.0, "preview": 1800.0}


class HangGuard(lightning.Callback):
    """limits: seconds by section, laid over `LIMITS`; 0 for none. folder: where `hang-<rank>.txt`
    is written beside what goes to stderr. Stands last among the callbacks, so that what they do
    belongs to the step."""

    def __init__(self, limits: Mapping[str, float], folder: Path) -> None:
        self.limits, self.folder = {**LIMITS, **limits}, folder
        self.now = ("data", time.monotonic())  # the section, and since when
        self._ended: threading.Event | None = None

    def enter(self, section: str) -> None:
        self.now = (section, time.monotonic())

    @contextmanager
    def inside(self, section: str) -> Iterator[None]:
        """For work of its own limit inside another section."""
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
            f"checkpoint stands. Stacks, also in {place}:\n"
        )
        with place.open("w", encoding="utf-8") as file:
            for stream in (file, sys.__stderr__ or file):
                stream.write(text)
                stream.flush()
                faulthandler.dump_traceback(stream)
        if (launcher := trainer.strategy.launcher) is not None:
            launcher.kill(signal.SIGKILL)
        vanish(HUNG)


def vanish(code: int) -> NoReturn:
    """Ends this process and its data workers without any of what Python does at an exit, which can
    wait for others."""
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stderr.flush()
    os._exit(code)
