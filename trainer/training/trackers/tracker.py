"""What every tracker has. It is one of Lightning's loggers, which Lightning ends with the run, and
takes pictures, clips and settings too."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL.Image import Image

from trainer.runs.run_folder import append_line

PROJECT = "attention-trainer"


class Tracker(Protocol):
    """The first thing that is asked of it opens it; what fails raises, see `steady.py`."""

    @property
    def experiment(self) -> Any:
        """Opens it, where that has not been done: an unwritable folder or an unreachable server
        fails here."""
        ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Numbers after a step."""
        ...

    def log_settings(self, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """The hyperparameters, plain values by full key; metrics: the numbers that a tracker may
        list beside them."""
        ...

    def log_pictures(
        self, name: str, pictures: Sequence[Image], *, prompts: Sequence[str], step: int
    ) -> None:
        """Pictures after a step, each of its prompt."""
        ...

    def log_clip(self, name: str, files: Sequence[Path], *, step: int) -> None:
        """A clip after a step: the files of `write_frames`, the last of them a GIF."""
        ...

    def save(self) -> None:
        """Writes what it has been told."""
        ...

    def finalize(self, status: str) -> None:
        """Ends it; status: success or failed."""
        ...


class PlainTracker(Logger):
    """A tracker that Lightning has no logger for."""

    @property
    def name(self) -> str:
        return PROJECT

    @property
    def version(self) -> str:
        return ""

    @property
    @abstractmethod
    def experiment(self) -> Any: ...

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Does nothing: `log_settings` has them."""


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


def shown_name(folder: Path) -> str:
    """The name of a run beside others: recipe and id, and of a concept of several its task."""
    parts = folder.resolve().parts
    return "/".join(parts[-3:] if re.fullmatch(r"task-\d+", folder.name) else parts[-2:])
