"""Logs the numbers of a run with its trackers. The step of each number is how many optimiser steps
were done when it was measured, as in the names of checkpoints and previews.

    train/loss                 of the step's last batch, the mean over all ranks
    train/grad_norm            of all gradients together, before they are clipped
    train/images_per_second    over all ranks, since the line before; validation, saves and previews
                               are left out. clips_ or samples_ where the data are no pictures
    train/peak_memory_mib      at most so far: on CUDA what torch has allocated, elsewhere the
                               resident set of the process, except on Windows; the largest of all
                               ranks
    train/effective_lr         where the optimiser finds it, see `optim.effective_lr`
    lr/<methods>               of each group of parameters, in the step
    val/loss, val/loss_t062    see `DiffusionModule.on_validation_epoch_end`
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning
import torch
from torch import nn

from trainer.training.callbacks.hang import HangGuard
from trainer.training.callbacks.nonfinite_and_signals import StepChecks
from trainer.training.distributed import largest
from trainer.training.module import DiffusionModule
from trainer.training.optim import effective_lr, lr_of_step
from trainer.training.trackers.make_trackers import log_metrics, log_settings

LOSSES = ("train/loss", "val/loss")


@dataclass(frozen=True)
class Measured:
    """What is measured of a run. samples: how many one optimiser step has, over all ranks; what:
    their name, as in images; owners: the parameters that each method trains, by their names;
    settings: of `flat_settings`."""

    samples: int
    what: str = "images"
    owners: Mapping[str, Sequence[str]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


class Metrics(lightning.Callback):
    """Logs after the first step, every `every` steps, after the last one, and each validation.

    hang: knows the time that steps have taken; watch: the norm of the gradients.
    """

    def __init__(
        self, every: int, measured: Measured, *, hang: HangGuard, watch: StepChecks
    ) -> None:
        self.every, self.measured, self.hang, self.watch = every, measured, hang, watch
        self.names: list[str] = []
        self.lrs: list[float] = []
        self.effective: float | None = None
        self.seen = self.logged = 0
        self.trained = 0.0

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        self.seen = self.logged = trainer.global_step
        self.trained = self.hang.trained()
        named, owners = pl_module.trainable(), self.measured.owners
        self.names = group_names(trainer.optimizers[0], named, owners=owners)
        if trainer.is_global_zero:
            log_settings(trainer, self.measured.settings, LOSSES)

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Right after the step the groups have the lr of the next one."""
        self.lrs = [lr_of_step(group) for group in optimizer.param_groups]
        self.effective = effective_lr(optimizer)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        step = trainer.global_step
        if step == self.seen:
            return  # a micro-batch in the middle of an accumulated step
        self.seen = step
        if step == 1 or step % self.every == 0 or step == trainer.max_steps:
            log_metrics(trainer, self._measure(trainer))

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """It must come before `SideWork` among the callbacks, which forgets that a validation has
        failed."""
        assert isinstance(pl_module, DiffusionModule)
        known = trainer.callback_metrics.items()
        found = {name: float(value) for name, value in known if name.startswith("val/")}
        if found and pl_module.val_problem is None:
            log_metrics(trainer, found)

    def _measure(self, trainer: lightning.Trainer) -> dict[str, float]:
        """The numbers of the step that was just done. Every rank must call this."""
        device, trained = trainer.strategy.root_device, self.hang.trained()
        samples = (self.seen - self.logged) * self.measured.samples
        found = {
            "train/loss": float(trainer.callback_metrics["train/loss"]),
            f"train/{self.measured.what}_per_second": samples / max(trained - self.trained, 1e-9),
            **{f"lr/{name}": lr for name, lr in zip(self.names, self.lrs, strict=True)},
        }
        if (memory := memory_so_far(device)) is not None:
            most = largest(torch.tensor(memory, device=device))
            found["train/peak_memory_mib"] = float(most)
        if self.watch.norm is not None:
            found["train/grad_norm"] = float(self.watch.norm)
        if self.effective is not None:
            found["train/effective_lr"] = self.effective
        self.logged, self.trained = self.seen, trained
        return found


def group_names(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    *,
    owners: Mapping[str, Sequence[str]],
) -> list[str]:
    """A name for each group of parameters: the methods that train them, as in lora-new_token, with
    the optimiser where there are several, and a number where two would be alike."""
    parts = getattr(optimizer, "parts", [optimizer])
    kinds = [type(part).__name__.lower() for part in parts for _ in part.param_groups]
    labels = []
    for kind, group in zip(kinds, optimizer.param_groups, strict=True):
        own = {id(value) for value in group["params"]}
        names = {name for name, value in named.items() if id(value) in own}
        methods = [method for method, trained in owners.items() if names & set(trained)]
        labels.append("-".join([*(methods or ["all"]), *([kind] if len(parts) > 1 else [])]))
    return [
        label if labels.count(label) == 1 else f"{label}-{labels[: number + 1].count(label)}"
        for number, label in enumerate(labels)
    ]


def memory_so_far(device: torch.device) -> float | None:
    """In MiB, of this process so far: on CUDA what torch has allocated at most, elsewhere the
    largest resident set; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # on Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere
