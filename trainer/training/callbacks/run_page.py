"""The page of a run, `report.html` in its folder: written anew at each validation, and when the run
ends, however it ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning

from trainer.runs.page.write_page import write_run_page
from trainer.runs.run_folder import note_event
from trainer.training.console import problem_of


class RunPage(lightning.Callback):
    """Writes it on the first rank. A page that cannot be written ends no run: that is said once,
    and no more are tried. It must come after all callbacks that write what it shows.

    say: prints a line.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.failed = False

    def write(self) -> None:
        """Also called when the adapter is there."""
        if self.failed:
            return
        try:
            write_run_page(self.folder)
        except Exception as error:
            self.failed = True
            note_event(self.folder, "page_failed", reason=problem_of(error))
            self.say(f"report.html: {problem_of(error)}; the run continues without its page")

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if trainer.is_global_zero:
            self.write()

    def on_exception(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            self.write()
