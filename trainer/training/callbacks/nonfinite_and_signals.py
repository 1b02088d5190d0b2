"""Checks before every optimiser step, on all ranks with one small all-reduce, whether a signal asks
the run to end, and whether a loss or a gradient is not finite (NaN or infinite).

A value that is not finite never changes a weight. The policy `raise` ends the run; `skip` skips the
step; `rollback` also restores weights, optimiser and moving average from the last checkpoint and
continues with the next batches, as in PaLM (arXiv 2204.02311, section 5.1). A skipped step counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import lightning
import torch
from torch import Tensor

from trainer.common.exit_codes import DISK, INTERRUPTED, NONFINITE, REQUEUE, TERMINATED, LeaveError
from trainer.data.loader import Batch
from trainer.runs.run_folder import note_event
from trainer.training.callbacks.save_and_restore import Checkpoints
from trainer.training.callbacks.signal_recorder import Signals
from trainer.training.distributed import clip_gradients, gather_values, largest, total_norm

Policy = Literal["raise", "skip", "rollback"]
SIGNALS = {TERMINATED: "SIGTERM", INTERRUPTED: "SIGINT", REQUEUE: "SIGUSR1"}


class StepChecks(lightning.Callback):
    """Skips or ends on values that are not finite, clips gradients, and ends the run on a signal.

    in_a_row, total: how many steps `skip` and `rollback` may skip. clip: the largest norm of the
    gradients, or None. say: prints a line, on the first rank. It must come after `Checkpoints`
    among the callbacks, because it saves the state that `Checkpoints` has marked. scaler: of the
    loss in fp16; it skips a step whose gradients only its scale has made infinite, and halves the
    scale.
    """

    def __init__(
        self,
        signals: Signals,
        checkpoints: Checkpoints,
        policy: Policy,
        in_a_row: int,
        total: int,
        clip: float | None,
        say: Callable[[str], None],
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.signals, self.checkpoints, self.policy, self.say = signals, checkpoints, policy, say
        self.in_a_row, self.total, self.clip, self.scaler = in_a_row, total, clip, scaler
        self.row = self.spent = self.stop = 0
        self.voted = checkpoints.saved
        self.batches: list[tuple[int, list[str]]] = []
        self.losses: list[Tensor] = []
        self.norm: Tensor | None = None  # of the last step's gradients, before they are clipped

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row, "spent": self.spent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.row, self.spent = state_dict["row"], state_dict["spent"]

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, _: int
    ) -> None:
        assert isinstance(batch, Batch)
        self.batches.append((batch.step, list(batch.keys)))

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Tensor
    ) -> None:
        own = loss.detach()
        self.losses.append(own if self.scaler is None else own / self.scaler.get_scale())

    @torch.no_grad()
    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        values = [value for group in optimizer.param_groups for value in group["params"]]
        gradients = [value.grad for value in values if value.grad is not None]
        self.norm = norm = total_norm(gradients)
        loss = torch.stack(self.losses).float().sum()
        self.stop, bad_loss, bad_norm = self._agree(trainer, loss, norm.to(loss))
        if bad_norm and not bad_loss and self.scaler is not None and self.scaler.get_scale() > 1:
            self._overflow(trainer, self.scaler.get_scale())
        elif bad_loss or bad_norm:
            self._skip(trainer, pl_module, optimizer=optimizer, norm=float(norm))
        else:
            self.row = 0
            if self.clip is not None:  # here, because the norm is known already
                clip_gradients(values, self.clip, norm)
        self.batches.clear()
        self.losses.clear()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        if self.checkpoints.tried != self.voted:  # a signal may have come during a save
            self.voted = self.checkpoints.tried
            self.stop = self._agree(trainer)[0]
        if self.stop:
            self._leave(trainer, pl_module)

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """The one epoch has all batches of the run: after it Lightning would begin another one,
        without a batch and without an end."""
        if trainer.global_step < trainer.max_steps:
            raise ValueError(
                f"the batches ended after step {trainer.global_step} of {trainer.max_steps}: the "
                "checkpoint counts them otherwise than this recipe; choose another run.id"
            )

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        self.stop = self._agree(trainer)[0]
        if self.stop:
            self._leave(trainer, pl_module)

    def _agree(self, trainer: lightning.Trainer, *values: Tensor) -> tuple[int, bool, bool]:
        """The exit code of a signal on any rank, 0 without one, and whether on any rank the loss
        and the norm of the gradients, the `values` after a backward, are not finite."""
        device = trainer.strategy.root_device
        received = torch.tensor(float(self.signals.received), device=device)
        wrong = [(~torch.isfinite(value)).float().to(device) for value in values]
        flags = largest(torch.stack([received, *wrong])).tolist()
        code, bad_loss, bad_norm = (*flags, 0, 0)[:3]
        return int(code), bool(bad_loss), bool(bad_norm)

    def _overflow(self, trainer: lightning.Trainer, scale: float) -> None:
        """Notes a step that the scaler skips: it has seen the same gradients."""
        if trainer.is_global_zero:
            note_event(self.checkpoints.folder, "overflow", step=trainer.global_step, scale=scale)

    def _leave(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        name, step = SIGNALS[self.stop], trainer.global_step
        problem = self.checkpoints.save(trainer, pl_module)
        if trainer.is_global_zero:
            note_event(
                self.checkpoints.folder, "stopped", signal=name, step=step, saved=not problem
            )
        if problem:
            raise LeaveError(DISK, f"{name} after step {step}, and {problem}")
        raise LeaveError(self.stop, f"{name}: saved after step {step} in {self.checkpoints.folder}")

    def _skip(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        *,
        optimizer: torch.optim.Optimizer,
        norm: float,
    ) -> None:
        """Applies the policy to a step whose loss or gradient is not finite."""
        step = trainer.global_step
        found = [each for rank in gather_values(self._found(trainer)) for each in rank]
        keys = sorted({key for each in found for key in each["keys"]})
        if trainer.is_global_zero:
            facts = {"policy": self.policy, "norm": str(norm), "batches": found}
            note_event(self.checkpoints.folder, "nonfinite", step=step, **facts)
        what = (
            f"step {step}: a loss or a gradient is not finite, in a batch of {', '.join(keys[:8])}"
        )
        if self.policy == "raise":
            raise LeaveError(
                NONFINITE,
                f"{what}; the weights have not changed. Fix the samples, lower optim.lr, or set "
                "run.on_nonfinite to skip or rollback, and resume with run=<run folder>",
            )
        self.row, self.spent = self.row + 1, self.spent + 1
        if self.row > self.in_a_row or self.spent > self.total:
            raise LeaveError(
                NONFINITE,
                f"{what}; {self.row} steps in a row and {self.spent} in total, more than "
                f"run.nonfinite_in_a_row={self.in_a_row} or run.nonfinite_total={self.total}",
            )
        if self.policy == "rollback":
            back = self.checkpoints.go_back(trainer, pl_module)
            self.say(f"{what}; back to the weights of step {back}, continuing with the next batch")
        else:
            self.say(f"{what}; the step is skipped")
        optimizer.zero_grad(set_to_none=True)  # a step without gradients changes nothing

    def _found(self, trainer: lightning.Trainer) -> list[dict[str, Any]]:
        """This rank's micro-batches of the step with their losses; only those with a loss that is
        not finite, if there are any."""
        rank, parts = trainer.global_rank, trainer.accumulate_grad_batches
        losses = [float(loss) * parts for loss in self.losses]
        pairs = list(zip(self.batches, losses, strict=True))
        bad = [pair for pair in pairs if not math.isfinite(pair[1])]
        return [
            {"rank": rank, "micro_step": micro_step, "loss": str(loss), "keys": keys}
            for (micro_step, keys), loss in bad or pairs
        ]
