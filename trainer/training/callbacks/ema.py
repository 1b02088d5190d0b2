"""Exponential moving average of the trained parameters: averaged <- d averaged + (1 - d) parameter.

The decay after k steps is min(d, (1 + k) / (10 + k)), so that the average of a short run does not
consist mainly of its start.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor

from trainer.training.distributed import as_sharded, local_part
from trainer.training.module import DiffusionModule


class EMA(lightning.Callback):
    """Keeps an average of each trained parameter. Validation, previews and the adapter use it."""

    def __init__(self, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.averaged: dict[str, Tensor] = {}
        self._stored: dict[str, Tensor] = {}

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        own = _module(pl_module).trainable()
        self.averaged = {name: value.detach().float().clone() for name, value in own.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        if trainer.global_step <= self.steps:
            return  # a micro-batch in the middle of an accumulated step
        self.steps = trainer.global_step
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        own = _module(pl_module).trainable()
        torch._foreach_lerp_(
            [local_part(value) for value in self.averaged.values()],
            [local_part(own[name].detach()).float() for name in self.averaged],
            1 - decay,
        )

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.give(_module(pl_module))

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self.take_back(_module(pl_module))

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "averaged": dict(self.averaged),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies a saved state into the tensors that `on_fit_start` made."""
        self.steps, stored = state_dict["steps"], state_dict["averaged"]
        assert stored.keys() == self.averaged.keys()
        for name, value in self.averaged.items():
            value.copy_(as_sharded(stored[name], value))

    @torch.no_grad()
    def give(self, module: DiffusionModule) -> None:
        if not self.averaged:
            return
        for name, parameter in module.trainable().items():
            self._stored[name] = parameter.detach().clone()
            parameter.copy_(self.averaged[name])

    @torch.no_grad()
    def take_back(self, module: DiffusionModule) -> None:
        """Gives the module its own weights back, if it has the averaged ones."""
        for name, parameter in module.trainable().items():
            if name in self._stored:
                parameter.copy_(self._stored[name])
        self._stored.clear()


def _module(module: lightning.LightningModule) -> DiffusionModule:
    assert isinstance(module, DiffusionModule)
    return module
