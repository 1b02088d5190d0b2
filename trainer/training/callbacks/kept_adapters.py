"""Adapters along the way (`run.keep_adapters`): what a run has learned after some of its steps, as
full adapter files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning
from torch import Tensor

from trainer.common.exit_codes import DISK, LeaveError
from trainer.runs.adapter import save_adapter
from trainer.runs.run_folder import kept_adapter, note_event
from trainer.training.callbacks.average import Average, averaged
from trainer.training.callbacks.hang import HangGuard
from trainer.training.distributed import value_of_first, whole_tree
from trainer.training.module import DiffusionModule


class KeptAdapters(lightning.Callback):
    """Writes `adapters/step_<step>.safetensors` after each of `steps`, with the weights that the
    run's own adapter would have then: those of the moving average where there is one.

    A resumed run trains the same weights again, so it writes the same bytes. What a method stores
    about the data after the last step (`Edit.finish`) is in the run's own adapter alone.

    tree: the recipe as adapters store it. on_full: whether the run stops or continues when a file
    cannot be written. say: prints a line, on the first rank.
    """

    def __init__(
        self,
        folder: Path,
        steps: Collection[int],
        *,
        tree: Mapping[str, Any],
        on_full: Literal["stop", "continue"],
        average: Average | None,
        hang: HangGuard,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.steps, self.tree = folder, frozenset(steps), dict(tree)
        self.on_full, self.average, self.hang, self.say = on_full, average, hang, say
        self.last = 0

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """A run that was stopped between its checkpoint and this file writes it now."""
        # the first rank looks: the others might see a file that it is only about to write
        if value_of_first(kept_adapter(self.folder, trainer.global_step).is_file()):
            self.last = trainer.global_step
        self._keep(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        self._keep(trainer, pl_module)

    def _keep(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        step = trainer.global_step
        if step == self.last or step not in self.steps:
            return  # also for a micro-batch in the middle of an accumulated step
        self.last = step
        assert isinstance(pl_module, DiffusionModule)
        problem = None
        with self.hang.inside("save"):
            with averaged(self.average, pl_module):
                tensors = whole_tree(pl_module.stored(), keep=trainer.is_global_zero)
                if trainer.is_global_zero:
                    problem = self._write(pl_module, tensors, step)
            problem = value_of_first(problem)
        if problem is not None and self.on_full == "stop":
            raise LeaveError(
                DISK, f"{problem}\nThe last checkpoint is kept; make room and start again"
            )

    def _write(
        self, module: DiffusionModule, tensors: Mapping[str, Tensor], step: int
    ) -> str | None:
        """Returns None, or what went wrong."""
        path, identity = kept_adapter(self.folder, step), module.backbone.identity()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_adapter(path, tensors, self.tree, identity=identity)
        except OSError as error:
            text = f"the adapter of step {step} was not kept: {error}"
            self.say(text)
            note_event(self.folder, "keep_failed", step=step, reason=str(error))
            return text
        return None
