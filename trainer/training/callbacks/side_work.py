"""Previews and validation are side work: where one fails, as by running out of memory, the run is
saved and goes on without it."""

from __future__ import annotations

from collections.abc import Callable

import lightning
import torch

from trainer.runs.run_folder import note_event
from trainer.training.callbacks.save_and_restore import Checkpoints
from trainer.training.module import DiffusionModule


class SideWork(lightning.Callback):
    """Ends validation after it has failed; previews ask it through `left_out`.

    say: prints a line, on the first rank. It must come after `Checkpoints` among the callbacks,
    because it saves the state that `Checkpoints` has marked.
    """

    def __init__(self, checkpoints: Checkpoints, say: Callable[[str], None]) -> None:
        self.checkpoints, self.say = checkpoints, say

    def left_out(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        *,
        what: str,
        problem: str,
    ) -> None:
        """Saves the run, and says that it goes on without `what`. Every rank must call this."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        failed = self.checkpoints.save(trainer, pl_module)
        step = trainer.global_step
        saved = "it is not saved" if failed else "it is saved"
        if trainer.is_global_zero:
            note_event(
                self.checkpoints.folder,
                f"{what}_failed",
                step=step,
                reason=problem,
                saved=not failed,
            )
        self.say(f"{what} failed at step {step}: {problem}; the run continues without, {saved}")

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        if pl_module.val_problem is not None:
            problem, pl_module.val_problem = pl_module.val_problem, None
            trainer.limit_val_batches = 0
            self.left_out(trainer, pl_module, what="validation", problem=problem)
