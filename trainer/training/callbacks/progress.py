"""The progress bar: step, loss, images a second, time left; plain lines without a terminal."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SILENCE = 60.0  # seconds without a line, after which the next step has one


class Bar(lightning.Callback):
    """samples: images or clips of one optimiser step, over all ranks; every: steps between two
    lines, without a terminal, fewer where these take more than a minute; what: the samples are
    called. The first step's own time, in which a model is compiled, counts for none but itself."""

    def __init__(
        self, samples: int, every: int, console: Console | None = None, *, what: str = "images"
    ) -> None:
        self.samples, self.every, self.console = samples, every, console or Console(stderr=True)
        self.what = what
        self.progress: Progress | None = None
        self.seen = 0
        self.smooth: float | None = None
        self.started = self.lined = time.monotonic()  # lined: when the last line was printed
        self.begun = 0  # the step before the first of this process
        self.first = 0  # the step that `started` is the end of

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.seen = self.first = self.begun = trainer.global_step
        self.started = self.lined = time.monotonic()
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} " + self.what + "/s"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=self.console)
        self.task = self.progress.add_task(
            "training", total=trainer.max_steps, completed=self.first, loss="-", rate="-"
        )
        self.progress.start()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        step = trainer.global_step
        if step == self.seen or not trainer.is_global_zero:
            return
        self.seen = step
        loss = float(trainer.callback_metrics.get("train/loss", float("nan")))
        if math.isfinite(loss):  # not finite in a step that was skipped
            self.smooth = loss if self.smooth is None else 0.98 * self.smooth + 0.02 * loss
        now = time.monotonic()
        self._show(trainer, step, now)
        if self.first == self.begun and step > self.first:
            self.first, self.started = step, now

    def _show(self, trainer: lightning.Trainer, step: int, now: float) -> None:
        spent = now - self.started
        shown = "-" if self.smooth is None else f"{self.smooth:.4f}"
        rate = (step - self.first) * self.samples / max(spent, 1e-9)
        if self.progress is not None:
            self.progress.update(self.task, completed=step, loss=shown, rate=f"{rate:.1f}")
            return
        if step % self.every and step != trainer.max_steps and now - self.lined < SILENCE:
            return
        self.lined = now
        left = (trainer.max_steps - step) * spent / (step - self.first)
        validation = trainer.callback_metrics.get("val/loss")
        held_out = f"  val {float(validation):.4f}" if validation is not None else ""
        self.console.print(
            f"step {step}/{trainer.max_steps}  loss {shown}{held_out}  {rate:.1f} "
            f"{self.what}/s  {left / 60:.1f} min left",
            highlight=False,
        )

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._stop()

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
