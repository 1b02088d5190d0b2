"""Reports which attention back ends were used, after the first batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning


class BackendReport(lightning.Callback):
    """Calls `report` once, after the first batch, on the first rank: a back end is known only once
    it has been used."""

    def __init__(self, report: Callable[[], None]) -> None:
        self.report = report
        self.done = False

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        if not self.done and trainer.is_global_zero:
            self.done = True
            self.report()
