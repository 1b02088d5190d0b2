"""trackio, which keeps its runs on this machine (`TRACKIO_DIR`) or where its own variables say, as
`TRACKIO_SPACE_ID`; `trackio show --project attention-trainer` shows them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL.Image import Image

from trainer.training.trackers.tracker import PROJECT, PlainTracker


class TrackioTracker(PlainTracker):
    """own: the id of the run, which is a part of its name in trackio: it knows a run that goes on
    by that. What trackio says goes to stderr: standard output is for the run folder."""

    def __init__(self, name: str, own: str, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.run_name, self.settings = f"{name} {own[:8]}", dict(settings)

    @cached_property
    def experiment(self) -> Any:
        import trackio

        with redirect_stdout(sys.stderr):
            return trackio.init(
                PROJECT, self.run_name, config=self.settings, resume="allow", embed=False,
                auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    def log_settings(self, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Does nothing: the run was made with them."""

    def log_pictures(
        self, name: str, pictures: Sequence[Image], *, prompts: Sequence[str], step: int
    ) -> None:
        import trackio

        shown = {
            f"{name}/{number:02d}": trackio.Image(picture, caption=prompt)
            for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True))
        }
        self.experiment.log(shown, step=step)

    def log_clip(self, name: str, files: Sequence[Path], *, step: int) -> None:
        import trackio

        self.experiment.log({name: trackio.Video(str(files[0]))}, step=step)

    def finalize(self, status: str) -> None:
        if "experiment" in self.__dict__:
            import trackio

            with redirect_stdout(sys.stderr):
                trackio.finish()
