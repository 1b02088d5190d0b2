"""Trackers: TensorBoard by default, wandb where asked (offline when nobody is logged in), or none;
and `metrics.jsonl`, which is always written.

A tracker is never worth a run: one that fails is told and left out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from trainer.runs.run_folder import append_line, note_event

UPLOADS = 60  # seconds that the end of a run waits for what wandb has not sent yet


class MetricsFile(Logger):
    """`metrics.jsonl` in the run folder: the numbers of each step that is logged. Steps that are
    trained again come again; the later line counts."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "metrics.jsonl"

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        shown = {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}
        append_line(self.path, {"step": step, **shown})

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """They are in `recipe.yaml`."""


class Steady(Logger):
    """A tracker whose failures do not end a run: it is left out, and the next of `trackers` takes
    its place, as long as there is one. failed: hears of the tracker and of what it has raised."""

    def __init__(
        self, trackers: Sequence[Logger], failed: Callable[[Logger, Exception], None]
    ) -> None:
        super().__init__()
        self.trackers, self.failed = list(trackers), failed

    def attempt(self, act: Callable[[Logger], Any]) -> Any:
        """What the first tracker that does not fail makes of it, None without any."""
        while self.trackers:
            try:
                return act(self.trackers[0])
            except Exception as error:
                self.failed(self.trackers.pop(0), error)
        return None

    @property
    def name(self) -> str | None:
        name: str | None = self.attempt(lambda tracker: tracker.name)
        return name

    @property
    def version(self) -> int | str | None:
        version: int | str | None = self.attempt(lambda tracker: tracker.version)
        return version

    @property
    def experiment(self) -> Any:
        """Made here at first use: where a folder cannot be written, or a server not be reached,
        this is where it shows."""
        return self.attempt(lambda tracker: getattr(tracker, "experiment", None))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.attempt(lambda tracker: tracker.log_metrics(metrics, step))

    def log_hyperparams(self, params: Any, *arguments: Any, **options: Any) -> None:
        self.attempt(lambda tracker: tracker.log_hyperparams(params, *arguments, **options))

    def save(self) -> None:
        self.attempt(lambda tracker: tracker.save())

    def finalize(self, status: str) -> None:
        """The end of the run, also wandb's, which else takes the next one of this process for the
        same."""

        def end(tracker: Logger) -> None:
            tracker.finalize(status)
            if isinstance(tracker, WandbLogger):
                import wandb

                wandb.finish(exit_code=0 if status == "success" else 1)

        self.attempt(end)


def make_trackers(
    name: str, folder: Path, recipe: Mapping[str, Any], say: Callable[[str], None]
) -> list[Logger]:
    """The loggers of a run; their files lie in the run folder. say: hears of one that fails.

    Raises:
        ValueError: wandb is asked for and not installed.
    """

    def failed(tracker: Logger, error: Exception) -> None:
        note_event(folder, "tracker_failed", tracker=type(tracker).__name__, reason=str(error))
        why = str(error).partition("\n")[0] or type(error).__name__
        say(f"tracker={name}: {why}; the run goes on, metrics.jsonl has its numbers")
        if isinstance(tracker, WandbLogger):
            import wandb

            wandb.teardown()  # it still holds the run's id

    record = MetricsFile(folder)
    if name == "none":
        return [record]
    trackers = [_tensorboard(folder)] if name == "tensorboard" else _wandb(folder, recipe)
    return [Steady(trackers, failed), record]


def _tensorboard(folder: Path) -> Logger:
    return TensorBoardLogger(folder, name="", version="tensorboard")


def _wandb(folder: Path, recipe: Mapping[str, Any]) -> list[Logger]:
    """Online where somebody is logged in, and offline, also where the server is not reached; what
    is kept then is sent by `wandb sync`."""
    try:
        import wandb
    except ModuleNotFoundError:
        raise ValueError(
            "tracker=wandb needs the package: pip install 'attention-trainer[wandb]'"
        ) from None
    # no code, no git diff, no machine facts: a run folder can be shared
    settings = wandb.Settings(
        disable_git=True, save_code=False, x_disable_meta=True, silent=True, finish_timeout=UPLOADS
    )
    online = bool(os.environ.get("WANDB_API_KEY")) or _logged_in()
    return [
        WandbLogger(
            project="attention-trainer", name=folder.name, id=folder.name, save_dir=folder,
            offline=offline, mode="offline" if offline else None,
            settings=settings, config=dict(recipe), resume="allow",
        )
        for offline in ((False, True) if online else (True,))
    ]  # fmt: skip


def attempt(logger: Logger, act: Callable[[Logger], None]) -> None:
    """What may be done with a tracker of ours: its failure ends nothing."""
    if isinstance(logger, Steady):
        logger.attempt(act)
    else:
        act(logger)


def log_picture(trainer: lightning.Trainer, name: str, image: Image.Image, step: int) -> None:
    """Hands a picture to every tracker of the run."""

    def hand(logger: Logger) -> None:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(logger, "log_image"):
            logger.log_image(name, [image], step=step)
        elif hasattr(experiment, "add_image"):
            experiment.add_image(
                name, torch.from_numpy(np.asarray(image).copy()), step, dataformats="HWC"
            )

    for logger in trainer.loggers:
        attempt(logger, hand)


def log_clip(trainer: lightning.Trainer, name: str, files: Sequence[Path], step: int) -> None:
    """Hands a film, the files of `films.play`, to every tracker of the run: the first of them to
    wandb, the GIF to TensorBoard, whose images may move.

    TensorBoard's `add_video` writes the same record, of a GIF by moviepy, whose present version it
    cannot import.
    """

    def hand(logger: Logger) -> None:
        if isinstance(logger, WandbLogger):
            logger.log_video(name, [str(files[0])], step=step)
        elif isinstance(logger, TensorBoardLogger):
            with Image.open(files[-1]) as film:
                width, height = film.size
            shown = Summary.Image(
                height=height,
                width=width,
                colorspace=3,
                encoded_image_string=files[-1].read_bytes(),
            )
            record = Summary(value=[Summary.Value(tag=name, image=shown)])
            logger.experiment.file_writer.add_summary(record, step)

    for logger in trainer.loggers:
        attempt(logger, hand)


def _logged_in() -> bool:
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="ignore")
