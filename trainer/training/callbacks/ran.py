"""The end of the first batch, when it is known what really ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning


class Ran(lightning.Callback):
    """Calls `tell` once, on the first rank."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self.tell = tell
        self.told = False

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        if not self.told and trainer.is_global_zero:
            self.told = True
            self.tell()
