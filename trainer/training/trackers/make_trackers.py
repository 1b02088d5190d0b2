"""The trackers of a run: TensorBoard by default, wandb, trackio or MLflow on request, or none; and
`metrics.jsonl`, which is always written.

A tracker that fails or that is slow neither ends a run nor holds it up, see `steady.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import Logger
from torch import Tensor

from trainer.media.images import to_pil
from trainer.runs.page.record import json_lines
from trainer.runs.run_folder import note_event
from trainer.training.tracker_id import tracker_id
from trainer.training.trackers.mlflow_runs import MlflowTracker
from trainer.training.trackers.steady import LEAVE, InBackground, Steady
from trainer.training.trackers.tensorboard_files import TensorBoardTracker
from trainer.training.trackers.tracker import MetricsFile, Tracker, shown_name
from trainer.training.trackers.trackio_runs import TrackioTracker
from trainer.training.trackers.wandb_runs import (
    WandbTracker,
    how_to_upload,
    wandb_trackers,
    why_wandb_failed,
)

Say = Callable[[str], None]


def make_trackers(
    name: str, folder: Path, settings: Mapping[str, Any], say: Say
) -> list[InBackground | MetricsFile]:
    """The loggers of a run. settings: of `flat_settings`; say: prints a line about a failure, a
    copied folder, or files that are to be uploaded."""
    record = MetricsFile(folder)
    if name == "none":
        return [record]

    def failed(tracker: Tracker, error: Exception) -> None:
        note_event(folder, "tracker_failed", tracker=type(tracker).__name__, reason=str(error))
        why = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(tracker, WandbTracker):
            why = why_wandb_failed(tracker, folder, error) or why
        say(f"tracker={name}: {why}; the run continues, and metrics.jsonl has its metrics")

    def ended(tracker: Tracker) -> None:
        if isinstance(tracker, WandbTracker) and (line := how_to_upload(tracker, folder)):
            say(line)

    known = {**settings, **lineage(folder)}
    steady = Steady(_trackers(name, folder, known, say=say), failed, ended)
    return [InBackground(steady, partial(_late, name, folder, say)), record]


def _trackers(
    name: str, folder: Path, settings: Mapping[str, Any], *, say: Say
) -> Sequence[Tracker]:
    """The trackers to try, one after another."""
    if name == "tensorboard":
        return [TensorBoardTracker(folder)]
    if name == "wandb":
        return wandb_trackers(folder, settings, say=say)
    shown, own = shown_name(folder), tracker_id(folder, say)
    if name == "trackio":
        return [TrackioTracker(shown, own, settings)]
    return [MlflowTracker(shown, own, folder)]


def _late(name: str, folder: Path, say: Say, *told: Any) -> None:
    """Notes what a slow tracker has not got. told: of `InBackground`."""
    left_out, busy = told
    note_event(folder, "tracker_late", tracker=name, left_out=left_out, busy=busy)
    parts = [f"{left_out} of its lines or pictures were left out"] if left_out else []
    parts += [f"it was not ready {LEAVE:g} seconds after the end"] if busy else []
    say(f"tracker={name} is slow: {' and '.join(parts)}; metrics.jsonl has all numbers")


def lineage(folder: Path) -> dict[str, str]:
    """When a run was begun and resumed, and after which steps, as one more setting."""
    starts = [each for each in json_lines(folder / "events.jsonl", []) if
              each.get("event") == "started"]  # fmt: skip
    told = [f"{each.get('time')} after step {each.get('step')}" for each in starts]
    return {"lineage": json.dumps(told)} if told else {}


def log_settings(
    trainer: lightning.Trainer, settings: Mapping[str, Any], metrics: Sequence[str]
) -> None:
    """Logs hyperparameters, plain values by full key; metrics: those that are listed beside
    them."""
    for logger in _others(trainer):
        logger.log_settings(settings, metrics)


def log_metrics(trainer: lightning.Trainer, metrics: dict[str, float]) -> None:
    """Logs metrics with every tracker of the run, at the present step."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, trainer.global_step)


def log_pictures(
    trainer: lightning.Trainer, name: str, pictures: Tensor, *, prompts: Sequence[str]
) -> None:
    """Logs pictures (n, 3, H, W) in [-1, 1] with every tracker of the run, at the present step."""
    images = [to_pil(picture) for picture in pictures]
    for logger in _others(trainer):
        logger.log_pictures(name, images, prompts=prompts, step=trainer.global_step)


def log_clip(trainer: lightning.Trainer, name: str, files: Sequence[Path]) -> None:
    """Logs a clip, the files of `write_frames`, with every tracker of the run, at the present
    step."""
    for logger in _others(trainer):
        logger.log_clip(name, files, step=trainer.global_step)


def _others(trainer: lightning.Trainer) -> list[InBackground]:
    """The trackers beside the file."""
    loggers: list[Logger] = trainer.loggers
    return [logger for logger in loggers if isinstance(logger, InBackground)]
