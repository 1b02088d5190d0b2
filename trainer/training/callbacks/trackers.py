"""Trackers: TensorBoard by default, wandb on request (offline without a login), or none; and
`metrics.jsonl`, which is always written.

A tracker that fails never ends a run: the failure is reported, and the tracker is not used further.
"""

from __future__ import annotations

import math
import os
import re
import shlex
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
from torch import Tensor
from torch.utils.tensorboard.summary import hparams

from trainer.media.grids import cell_side, grid
from trainer.media.images import to_pil
from trainer.runs.run_folder import append_line, note_event
from trainer.training.tracker_id import tracker_id

UPLOADS = 60  # seconds that the end of a run waits for wandb's uploads
SHOWN = 512  # pixels of the longer side of a preview in TensorBoard


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


class WandbTracker(WandbLogger):
    """Its steps are those of the run, with Lightning's `trainer/global_step` beside them. What is
    logged again after a resume, when wandb is at a later step, follows there: wandb would drop it
    under its own step."""

    least = 0  # the first step that wandb still takes

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        run = self.experiment
        least = max(self.least, run.starting_step)
        taken = step is not None and step >= least
        run.log({**metrics, "trainer/global_step": step}, step=step if taken else None)
        self.least = step if taken and step is not None else least + 1


class Steady(Logger):
    """A tracker whose failures do not end a run. If the first of `trackers` fails, the next one is
    used, until none is left. failed: is called with the failed tracker and the exception; ended:
    with the tracker whose files are complete."""

    def __init__(
        self,
        trackers: Sequence[Logger],
        failed: Callable[[Logger, Exception], None],
        ended: Callable[[Logger], None] | None = None,
    ) -> None:
        super().__init__()
        self.trackers, self.failed, self.ended = list(trackers), failed, ended

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
            if self.ended is not None:
                self.ended(tracker)

        self.attempt(end)


def make_trackers(
    name: str, folder: Path, settings: Mapping[str, Any], say: Callable[[str], None]
) -> list[Logger]:
    """The loggers of a run, whose files are in the run folder. settings: of `flat_settings`; say:
    prints a line about a failure, a copied folder, or files that are to be uploaded."""

    def failed(tracker: Logger, error: Exception) -> None:
        note_event(folder, "tracker_failed", tracker=type(tracker).__name__, reason=str(error))
        why = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, TimeoutError) and isinstance(tracker, WandbLogger):
            sync = sync_command(folder, tracker)
            why = f"not all was uploaded after {UPLOADS:g} seconds, `{sync}` sends the rest"
        say(f"tracker={name}: {why}; the run continues, and metrics.jsonl has its metrics")
        if isinstance(tracker, WandbLogger):
            import wandb

            wandb.teardown()  # it still uses the id of the run

    def ended(tracker: Logger) -> None:
        if isinstance(tracker, WandbLogger) and tracker._offline and _used(tracker):
            say(f"wandb was offline; to upload this run: {sync_command(folder, tracker)}")

    record = MetricsFile(folder)
    if name == "none":
        return [record]
    if name == "tensorboard":
        return [Steady([_tensorboard(folder)], failed), record]
    return [Steady(_wandb(folder, settings, say=say), failed, ended), record]


def _tensorboard(folder: Path) -> Logger:
    return TensorBoardLogger(folder, name="", version="tensorboard")


def _wandb(
    folder: Path, settings: Mapping[str, Any], *, say: Callable[[str], None]
) -> list[Logger]:
    """An online and an offline logger if somebody is logged in, else an offline one. `wandb sync`
    uploads what an offline logger stored."""
    import wandb

    # no code, no git diff, no machine facts: a run folder can be shared
    private = wandb.Settings(
        disable_git=True, save_code=False, x_disable_meta=True, silent=True,
        finish_timeout=UPLOADS, finish_timeout_raises=True,
    )  # fmt: skip
    online = bool(os.environ.get("WANDB_API_KEY")) or _logged_in()
    own = tracker_id(folder, say)
    return [
        WandbTracker(
            project="attention-trainer", name=shown_name(folder), id=own, save_dir=folder,
            offline=offline, mode="offline" if offline else None,
            settings=private, config=dict(settings), resume="allow",
        )
        for offline in ((False, True) if online else (True,))
    ]  # fmt: skip


def sync_command(folder: Path, tracker: WandbLogger) -> str:
    """What uploads the files of the run in a folder: a folder for each time that it was begun or
    resumed, the earliest first."""
    kind = "offline-run" if tracker._offline else "run"
    kept = sorted(folder.glob(f"wandb/{kind}-*-{tracker._wandb_init['id']}"))
    online = [] if tracker._offline else ["--include-online"]
    return shlex.join(["wandb", "sync", *online, *map(str, kept)])


def _used(tracker: WandbLogger) -> bool:
    """Whether anything was logged with it: then it has made its files."""
    return tracker._experiment is not None


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


def log_settings(
    trainer: lightning.Trainer, settings: Mapping[str, Any], metrics: Sequence[str]
) -> None:
    """Logs hyperparameters, plain values by full key, with TensorBoard; wandb was made with them.
    metrics: those that TensorBoard lists beside them."""

    def log(logger: Logger) -> None:
        if isinstance(logger, TensorBoardLogger):
            logger.hparams.update(settings)
            for summary in hparams(dict(settings), dict.fromkeys(metrics)):
                logger.experiment.file_writer.add_summary(summary, 0)

    for logger in trainer.loggers:
        attempt(logger, log)


def log_metrics(trainer: lightning.Trainer, metrics: dict[str, float]) -> None:
    """Logs metrics with every tracker of the run, at the present step."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, trainer.global_step)
        logger.save()


def log_pictures(
    trainer: lightning.Trainer, name: str, pictures: Tensor, *, prompts: Sequence[str]
) -> None:
    """Logs pictures (n, 3, H, W) in [-1, 1] with every tracker of the run, at the present step:
    with wandb each alone in its full size, with TensorBoard as a row of up to `SHOWN` pixels
    each."""
    step = trainer.global_step

    def log(logger: Logger) -> None:
        if isinstance(logger, WandbLogger):
            images = [to_pil(picture) for picture in pictures]
            logger.log_image(name, images, step=step, caption=list(prompts))
        elif isinstance(logger, TensorBoardLogger):
            row = grid([(f"step {step}", pictures)], prompts, cell_side(pictures, SHOWN))
            pixels = torch.from_numpy(np.asarray(row).copy())
            logger.experiment.add_image(name, pixels, global_step=step, dataformats="HWC")

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
