"""Trackers: TensorBoard by default, wandb on request (offline without a login), or none; and
`metrics.jsonl`, which is always written.

A tracker that fails never ends a run: the failure is reported, and the tracker is not used further.
"""

from __future__ import annotations

import math
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from trainer.runs.run_folder import append_line, note_event, write_text
from trainer.training.console import first_rank

TRACKER_ID = "tracker.id"  # the file in a run folder
UPLOADS = 60  # seconds that the end of a run waits for wandb's uploads


class MetricsFile(Logger):
    """`metrics.jsonl` in the run folder: the metrics of each logged step. A step that is trained
    again after a resume has a second line, and the later one counts."""

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
        """Does nothing: they are in `recipe.yaml`."""


class Steady(Logger):
    """A tracker whose failures do not end a run. If the first of `trackers` fails, the next one is
    used, until none is left. failed: is called with the failed tracker and the exception."""

    def __init__(
        self, trackers: Sequence[Logger], failed: Callable[[Logger, Exception], None]
    ) -> None:
        super().__init__()
        self.trackers, self.failed = list(trackers), failed

    def attempt(self, act: Callable[[Logger], Any]) -> Any:
        """The result of `act` on the first tracker that does not fail; None if all fail."""
        while self.trackers:
            try:
                return act(self.trackers[0])
            except Exception as error:
                with suppress(Exception):  # what ends a broken tracker may be broken, too
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
        """Made at first use, so an unwritable folder or an unreachable server fails here."""
        return self.attempt(lambda tracker: getattr(tracker, "experiment", None))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.attempt(lambda tracker: tracker.log_metrics(metrics, step))

    def log_hyperparams(self, params: Any, *arguments: Any, **options: Any) -> None:
        self.attempt(lambda tracker: tracker.log_hyperparams(params, *arguments, **options))

    def save(self) -> None:
        self.attempt(lambda tracker: tracker.save())

    def finalize(self, status: str) -> None:
        """Ends the run. For wandb also its own run, which it would otherwise continue with the next
        run of this process."""

        def end(tracker: Logger) -> None:
            tracker.finalize(status)
            if isinstance(tracker, WandbLogger):
                import wandb

                wandb.finish(exit_code=0 if status == "success" else 1)

        self.attempt(end)


def make_trackers(
    name: str, folder: Path, recipe: Mapping[str, Any], say: Callable[[str], None]
) -> list[Logger]:
    """The loggers of a run, whose files are in the run folder. say: prints a line about a failure.

    Raises:
        ValueError: wandb is requested and not installed.
    """

    def failed(tracker: Logger, error: Exception) -> None:
        note_event(folder, "tracker_failed", tracker=type(tracker).__name__, reason=str(error))
        why = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, TimeoutError) and isinstance(tracker, WandbLogger):
            sync = f"`wandb sync {folder}/wandb/*` sends the rest"
            why = f"not all was uploaded after {UPLOADS:g} seconds, {sync}"
        say(f"tracker={name}: {why}; the run continues, and metrics.jsonl has its metrics")
        if isinstance(tracker, WandbLogger):
            import wandb

            wandb.teardown()  # it still uses the id of the run

    record = MetricsFile(folder)
    if name == "none":
        return [record]
    trackers = [_tensorboard(folder)] if name == "tensorboard" else _wandb(folder, recipe)
    return [Steady(trackers, failed), record]


def _tensorboard(folder: Path) -> Logger:
    return TensorBoardLogger(folder, name="", version="tensorboard")


def _wandb(folder: Path, recipe: Mapping[str, Any]) -> list[Logger]:
    """An online and an offline logger if somebody is logged in, else an offline one. `wandb sync`
    uploads what an offline logger stored."""
    try:
        import wandb
    except ModuleNotFoundError:
        raise ValueError(
            "tracker=wandb needs the package: pip install 'attention-trainer[wandb]'"
        ) from None
    # no code, no git diff, no machine facts: a run folder can be shared
    settings = wandb.Settings(
        disable_git=True, save_code=False, x_disable_meta=True, silent=True,
        finish_timeout=UPLOADS, finish_timeout_raises=True,
    )  # fmt: skip
    online = bool(os.environ.get("WANDB_API_KEY")) or _logged_in()
    own = tracker_id(folder)
    return [
        WandbLogger(
            project="attention-trainer", name=shown_name(folder), id=own, save_dir=folder,
            offline=offline, mode="offline" if offline else None,
            settings=settings, config=dict(recipe), resume="allow",
        )
        for offline in ((False, True) if online else (True,))
    ]  # fmt: skip


def tracker_id(folder: Path) -> str:
    """The id of a run for its tracker: drawn when the run begins and kept in its folder, so that
    two runs never share one, whatever they are called, and a resumed run keeps its own."""
    place = folder / TRACKER_ID
    with suppress(OSError):
        if found := place.read_text(encoding="utf-8").strip():
            return found
    # an earlier version took the name of the folder
    earlier = any(folder.glob(f"wandb/*run-*-{folder.name}"))
    own = folder.name if earlier else uuid.uuid4().hex
    if first_rank():  # the others have no tracker
        with suppress(OSError):
            write_text(place, own + "\n")
    return own


def shown_name(folder: Path) -> str:
    """The name of a run beside others: recipe and id, and of a concept of several its task."""
    parts = folder.resolve().parts
    return "/".join(parts[-3:] if re.fullmatch(r"task-\d+", folder.name) else parts[-2:])


def attempt(logger: Logger, act: Callable[[Logger], None]) -> None:
    """Calls `act` on a logger; a failing tracker does not end the run."""
    if isinstance(logger, Steady):
        logger.attempt(act)
    else:
        act(logger)


def log_picture(trainer: lightning.Trainer, name: str, image: Image.Image) -> None:
    """Logs a picture with every tracker of the run, at the present step."""
    step = trainer.global_step

    def log(logger: Logger) -> None:
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(logger, "log_image"):
            logger.log_image(name, [image], step=step)
        elif hasattr(experiment, "add_image"):
            pixels = torch.from_numpy(np.asarray(image).copy())
            experiment.add_image(name, pixels, global_step=step, dataformats="HWC")

    for logger in trainer.loggers:
        attempt(logger, log)


def log_clip(trainer: lightning.Trainer, name: str, files: Sequence[Path]) -> None:
    """Logs a clip, the files of `write_frames`, with every tracker of the run, at the present step.

    wandb gets the first file, TensorBoard the GIF as an image. TensorBoard's `add_video` would
    write the same record, but needs moviepy, whose present version it cannot import.
    """
    step = trainer.global_step

    def log(logger: Logger) -> None:
        if isinstance(logger, WandbLogger):
            logger.log_video(name, [str(files[0])], step=step)
        elif isinstance(logger, TensorBoardLogger):
            with Image.open(files[-1]) as clip:
                width, height = clip.size
            shown = Summary.Image(
                height=height,
                width=width,
                colorspace=3,
                encoded_image_string=files[-1].read_bytes(),
            )
            record = Summary(value=[Summary.Value(tag=name, image=shown)])
            logger.experiment.file_writer.add_summary(record, step)

    for logger in trainer.loggers:
        attempt(logger, log)


def _logged_in() -> bool:
    """Whether wandb's login is in .netrc."""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="ignore")
