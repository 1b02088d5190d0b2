"""Logs the numbers of a run with its trackers. The step of each number is how many optimiser steps
were done when it was measured, as in the names of checkpoints and previews.

    train/loss                 of the step's last batch, the mean over all ranks
    train/loss_smooth          the same, smoothed over about 50 steps; anew after a resume
    train/loss_t062 ...        of each eighth of the timesteps, since the line before, see
                               `loss_bins.py`
    train/grad_norm            of all gradients together, before they are clipped
    train/update_ratio         how far the step has moved the weights, as a share of them
    weight_norm/<block>        of the weights that train, see `weight_numbers.py`
    time/data_ms, forward_ms, backward_ms, optimizer_ms
                               of a step, its mean since the line before
    train/model_tflops         a second over all ranks, see `flops.py`; not of compiled models
    train/mfu                  the share of the devices' rate that these are, where it is known
    data/samples, passes       seen so far; passes over the data where they can be counted
    data/skipped_steps         left out because something was not finite, so far
    train/images_per_second    over all ranks, since the line before; validation, saves and previews
                               are left out. clips_ or samples_ where the data are no pictures
    train/peak_memory_mib      at most so far: on CUDA what torch has allocated, elsewhere the
                               resident set of the process, except on Windows; the largest of all
                               ranks
    train/reserved_memory_mib  on CUDA, what torch has taken from the device at most so far
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
from torch import Tensor, nn

from trainer.training.callbacks.hang import HangGuard
from trainer.training.callbacks.nonfinite_and_signals import StepChecks
from trainer.training.distributed import largest
from trainer.training.flops import FlopCount, is_compiled, peak_rate
from trainer.training.loss_bins import LossBins
from trainer.training.module import DiffusionModule
from trainer.training.optim import effective_lr, lr_of_step
from trainer.training.step_clock import StepClock
from trainer.training.trackers.make_trackers import log_metrics, log_settings
from trainer.training.weight_numbers import block_norms, sampled, update_ratio

LOSSES = ("train/loss", "val/loss")
KEPT = 0.98  # of the smoothed loss, at each step


@dataclass(frozen=True)
class Measured:
    """What is measured of a run. samples: how many one optimiser step has, over all ranks; count:
    how many the data have, None where that is not known; what: their name, as in images; owners:
    the parameters that each method trains, by their names; settings: of
    `flat_settings`."""

    samples: int
    what: str = "images"
    count: int | None = None
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
        self.named: Mapping[str, nn.Parameter] = {}  # what trains; finding it takes a while
        self.names: list[str] = []
        self.lrs: list[float] = []
        self.effective: float | None = None
        self.seen = self.logged = 0
        self.trained = self.waited = 0.0
        self.bins = LossBins()
        self.smooth: Tensor | None = None
        self.clock = StepClock(cuda=False)
        self.weights: list[Tensor] | None = None  # before a step that is logged
        self.flops = StepFlops(False)

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        self.seen = self.logged = trainer.global_step
        self.trained, self.waited = self.hang.trained(), self.hang.spent("data")
        self.flops = StepFlops(not is_compiled(pl_module.backbone.denoiser))
        self.clock = StepClock(trainer.strategy.root_device.type == "cuda")
        self.named, owners = pl_module.trainable(), self.measured.owners
        self.names = group_names(trainer.optimizers[0], self.named, owners=owners)
        if trainer.is_global_zero:
            log_settings(trainer, self.measured.settings, LOSSES)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, _: int
    ) -> None:
        self.flops.begin(encodes=batch.moments is None)
        self.clock.begin()

    def on_before_backward(self, *_: Any, **__: Any) -> None:
        self.clock.mark()

    def on_after_backward(self, *_: Any, **__: Any) -> None:
        self.clock.mark()
        self.flops.end()

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Right after the step the groups have the lr of the next one."""
        if self._due(trainer, trainer.global_step + 1):
            self.lrs = [lr_of_step(group) for group in optimizer.param_groups]
            self.effective = effective_lr(optimizer)
            self.weights = sampled(self.named)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        self.clock.mark()
        if pl_module.losses is not None and pl_module.losses[1] is not None:
            self.bins.add(pl_module.losses[0], pl_module.losses[1])
        step = trainer.global_step
        if step == self.seen:
            return  # a micro-batch in the middle of an accumulated step
        self.seen = step
        self.smooth = with_loss(self.smooth, trainer.callback_metrics["train/loss"])
        if self._due(trainer, step):
            log_metrics(trainer, self._measure(trainer, pl_module))

    def on_exception(self, *_: Any) -> None:
        self.flops.end()  # it may have been in the middle of a batch

    def _due(self, trainer: lightning.Trainer, step: int) -> bool:
        return step == 1 or step % self.every == 0 or step == trainer.max_steps

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

    def _measure(self, trainer: lightning.Trainer, module: DiffusionModule) -> dict[str, float]:
        """The numbers of the step that was just done. Every rank must call this."""
        device, trained = trainer.strategy.root_device, self.hang.trained()
        steps, seconds = self.seen - self.logged, max(trained - self.trained, 1e-9)
        found = {"train/loss": float(trainer.callback_metrics["train/loss"])}
        if self.smooth is not None:
            found["train/loss_smooth"] = float(self.smooth)
        found |= self.bins.take()
        found[f"train/{self.measured.what}_per_second"] = steps * self.measured.samples / seconds
        found |= {f"lr/{name}": lr for name, lr in zip(self.names, self.lrs, strict=True)}
        found |= self._weights() | self._times(steps) | self._counts()
        found |= self.flops.numbers(trainer, module, seconds)
        for name, own in memory_so_far(device).items():
            found[f"train/{name}_memory_mib"] = float(largest(torch.tensor(own, device=device)))
        if self.watch.norm is not None:
            found["train/grad_norm"] = float(self.watch.norm)
        if self.effective is not None:
            found["train/effective_lr"] = self.effective
        self.logged, self.trained = self.seen, trained
        return found

    def _weights(self) -> dict[str, float]:
        found = {f"weight_norm/{block}": norm for block, norm in block_norms(self.named).items()}
        ratio = None if self.weights is None else update_ratio(self.weights, self.named)
        self.weights = None
        return found if ratio is None else {"train/update_ratio": ratio, **found}

    def _times(self, steps: int) -> dict[str, float]:
        waited = self.hang.spent("data")
        parts = {"data": waited - self.waited, **self.clock.take()}
        self.waited = waited
        return {f"time/{part}_ms": 1000 * own / steps for part, own in parts.items()}

    def _counts(self) -> dict[str, float]:
        samples = self.seen * self.measured.samples
        found = {"data/samples": float(samples), "data/skipped_steps": float(self.watch.spent)}
        if self.measured.count:
            found["data/passes"] = samples / self.measured.count
        return found


def with_loss(before: Tensor | None, loss: Tensor) -> Tensor:
    """The moving average of losses with one more; one that is not finite changes nothing. It stays
    on its device: nothing waits for it."""
    own = loss.detach().float()
    if before is None:
        return own
    smooth = torch.where(torch.isfinite(before), before.lerp(own, 1 - KEPT), own)
    return torch.where(torch.isfinite(own), smooth, before)


class StepFlops:
    """The operations of the batches of this process. Counted is the first one that encodes its
    pictures and the first one that has latents: a stream's are kept in the first epoch, so its
    later batches have fewer operations."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.counting: FlopCount | None = None
        self.known: dict[bool, int] = {}  # of a batch of one rank, by whether it encodes pictures
        self.encodes = False
        self.done = 0  # since the numbers were asked for last

    def begin(self, *, encodes: bool) -> None:
        self.encodes = encodes
        if self.wanted and encodes not in self.known:
            self.counting = FlopCount()
            self.counting.begin()

    def end(self) -> None:
        if self.counting is not None:
            self.known[self.encodes], self.counting = self.counting.end(), None
        self.done += self.known.get(self.encodes, 0)

    def numbers(
        self, trainer: lightning.Trainer, module: DiffusionModule, seconds: float
    ) -> dict[str, float]:
        """seconds: of all steps since they were asked for last."""
        rate, self.done = self.done / seconds, 0  # of a rank
        if not rate:
            return {}
        found = {"train/model_tflops": rate * trainer.world_size / 1e12}
        peak = peak_rate(trainer.strategy.root_device, module.backbone.computes_in)
        return found if peak is None else {**found, "train/mfu": rate / peak}


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


def memory_so_far(device: torch.device) -> dict[str, float]:
    """In MiB, of this process at most so far. On CUDA `peak`, what torch has allocated, and
    `reserved`, what it has taken from the device; elsewhere `peak`, the resident set; nothing where
    the system does not say."""
    if device.type == "cuda":
        taken = {
            "peak": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
        return {name: own / 2**20 for name, own in taken.items()}
    try:
        import resource
    except ImportError:  # on Windows
        return {}
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # bytes on macOS, KiB elsewhere
    return {"peak": used / (2**20 if sys.platform == "darwin" else 2**10)}
