"""The run's place: one integer in every checkpoint, the micro-batches trained (not those a loader
has fetched)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch


class MicroStep(lightning.Callback):
    def on_save_checkpoint(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        checkpoint["micro_step"] = trainer.fit_loop.epoch_loop.batch_progress.total.ready


def resume_point(folder: Path) -> tuple[str | None, int]:
    """The last checkpoint of a run folder and the micro-batch to go on with; (None, 0) for a fresh
    run."""
    last = folder / "checkpoints" / "last.ckpt"
    if not last.is_file():
        return None, 0
    return str(last), int(torch.load(last, weights_only=True, map_location="cpu")["micro_step"])
