"""The two sets of weights of schedule-free AdamW (arXiv 2405.15682, equation 1): gradients are
those of y = (1 - beta) z + beta x, and the result is x, an average of all z.

The parameters hold y while training, and in checkpoints, so that a run resumes with the bits it
had. `eval()` of the optimiser turns them into x, and `train()` back, but for rounding: y is kept
and put back, so that a preview or a validation changes nothing in the run.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor

from trainer.training.module import DiffusionModule


class ScheduleFree(lightning.Callback):
    """Gives the module x for validation, previews and the adapter."""

    def __init__(self) -> None:
        self.optimizer: Any = None
        self._stored: dict[str, Tensor] = {}

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.optimizer = trainer.optimizers[0]

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        self.give(pl_module)

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        self.take_back(pl_module)

    def give(self, module: DiffusionModule) -> None:
        if self.optimizer is None:
            return
        for name, parameter in module.trainable().items():
            self._stored[name] = parameter.detach().clone()
        self.optimizer.eval()

    @torch.no_grad()
    def take_back(self, module: DiffusionModule) -> None:
        """Gives the module y back, bit for bit, if it has x."""
        if not self._stored:
            return
        self.optimizer.train()
        for name, parameter in module.trainable().items():
            parameter.copy_(self._stored[name])
        self._stored.clear()
