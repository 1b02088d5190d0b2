"""Saves a run's state to the folders of `checkpoint_files.py`, and restores it from them.

A checkpoint always holds the state at the end of an optimiser step. A resumed run has the same
weights, moments, moving average and random numbers as a run that never stopped, bit for bit, if
software, number of ranks and devices are the same.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning
import torch
from torch import Tensor

from trainer.common.exit_codes import DISK, NONFINITE, LeaveError
from trainer.runs.run_folder import note_event, step_name
from trainer.training.callbacks.average import Average
from trainer.training.callbacks.ema import EMA
from trainer.training.callbacks.hang import HangGuard
from trainer.training.checkpoint_files import (
    Checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from trainer.training.distributed import (
    as_sharded,
    gather_values,
    shard_state,
    value_of_first,
    whole_tree,
)
from trainer.training.module import DiffusionModule
from trainer.training.optim import order_of, restore_moments, restore_schedule
from trainer.training.rng_states import get_rng_states, set_rng_states

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Stateful(Protocol):
    """A part of the run with a state of its own, plain values and tensors."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class StepEnd:
    """The state of the loop at the end of an optimiser step: its counters, and the states of this
    rank's random number generators."""

    step: int
    micro_step: int
    loops: dict[str, Any]
    rng: dict[str, Any]


class Checkpoints(lightning.Callback):
    """Writes a checkpoint every `every` steps (0: never), after the last step, and when `save` is
    called; keeps the `keep` newest.

    found: the checkpoint to resume from. facts: plain values for every manifest. on_full: whether
    the run stops or continues when a checkpoint cannot be written. say: prints a line, on the
    first rank. The attribute `parts` has further objects to save and restore, by name.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        keep: int,
        found: Checkpoint | None,
        facts: Mapping[str, Any],
        on_full: Literal["stop", "continue"],
        hang: HangGuard,
        average: Average | None,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.root = folder, folder / "checkpoints"
        self.every, self.keep, self.found, self.facts = every, keep, found, dict(facts)
        self.on_full, self.hang, self.average, self.say = on_full, hang, average, say
        self.parts: dict[str, Stateful] = {"ema": average} if isinstance(average, EMA) else {}
        self.end: StepEnd | None = None
        self.saved = self.tried = found.step if found else 0
        self.parent = found.folder.name if found else None
        self._rng: dict[str, Any] | None = None

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        step = self.found.step if self.found else 0
        if len(set(gather_values(step))) > 1:
            raise ValueError(
                f"the ranks do not see the same checkpoints in {self.root}; give run.out or run= a "
                "folder that all nodes share"
            )
        if self.found is not None:
            state = self._load(trainer, pl_module, self.found)
            restore_schedule(_schedule(trainer), state["schedule"])
            trainer.fit_loop.load_state_dict(state["loops"])
            if len(state["rng"]) == trainer.world_size:
                self._rng = state["rng"][trainer.global_rank]

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if self._rng is not None:
            set_rng_states(self._rng)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        step = trainer.global_step
        due = bool(self.every) and (step % self.every == 0 or step == trainer.max_steps)
        last = step == trainer.max_steps  # a preview after it may ask for a save
        if step != self.tried and (due or last or _validates(trainer)):
            self._mark(trainer)
        if step != self.tried and due:
            self.tried = step
            problem = self.save(trainer, pl_module)
            if problem and self.on_full == "stop":
                raise LeaveError(
                    DISK, f"{problem}\nThe last checkpoint is kept; make room and start again"
                )

    def save(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> str | None:
        """Writes the state at the end of the last step, unless it is written already. Every rank
        must call this. Returns what went wrong, the same on every rank, or None.

        Raises:
            LeaveError: a trained value is not finite; nothing was written.
        """
        assert isinstance(pl_module, DiffusionModule)
        if self.end is None or self.end.step != trainer.global_step:
            self._mark(trainer)
        assert self.end is not None
        if self.saved == self.end.step:
            return None
        if self.average is not None:
            self.average.take_back(pl_module)  # during validation the model has averaged weights
        with self.hang.inside("save"):
            rng, first = gather_values(self.end.rng), trainer.is_global_zero
            weights = whole_tree(pl_module.stored(), keep=first)
            state = whole_tree(self._state(trainer), keep=first) | {"rng": rng}
            problem = None
            if first:
                problem = self._write(trainer, pl_module, weights=weights, state=state)
            problem = value_of_first(problem)
        if problem is None:
            self.saved, self.parent = self.end.step, step_name(self.end.step)
            return None
        code, text = problem
        if code == NONFINITE:
            raise LeaveError(code, text)
        return text

    def go_back(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> int:
        """Restores weights, optimiser and moving average from the newest checkpoint. The loop, the
        learning rate and the data continue from the present step. Returns the checkpoint's step.

        Raises:
            LeaveError: there is no checkpoint.
        """
        found = newest_checkpoint(self.root, self.say)
        if found is None:
            raise LeaveError(NONFINITE, "there is no checkpoint to go back to yet")
        counts = {name: part.state_dict() for name, part in self.parts.items() if name != "ema"}
        self._load(trainer, pl_module, found)
        for name, count in counts.items():
            self.parts[name].load_state_dict(count)
        return found.step

    def _mark(self, trainer: lightning.Trainer) -> None:
        micro_step = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        loops = trainer.fit_loop.state_dict()
        self.end = StepEnd(
            step=trainer.global_step,
            micro_step=micro_step,
            loops=loops,
            rng=get_rng_states(trainer.strategy.root_device),
        )

    def _load(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, found: Checkpoint
    ) -> dict[str, Any]:
        assert isinstance(pl_module, DiffusionModule)
        weights, state = read_checkpoint(found)
        optimizer = trainer.optimizers[0]
        kind = found.manifest["optimizer"]
        if kind != type(optimizer).__name__:
            raise ValueError(
                f"{found.folder} was made with the optimiser {kind}, and this run has "
                f"{type(optimizer).__name__}; keep optim.name, or choose another run.id"
            )
        _fill(pl_module.stored(), weights, found.folder)
        restore_moments(
            optimizer,
            state["optimizer"],
            before=state.get("order"),
            now=order_of(optimizer, pl_module.trainable()),
        )
        shard_state(optimizer)
        if set(state["parts"]) != set(self.parts):
            raise ValueError(
                f"{found.folder} holds the state of {sorted(state['parts'])}, and this run has "
                f"{sorted(self.parts)}; keep optim.ema and run.precision as they were, or choose "
                "another run.id"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        return state

    def _write(
        self,
        trainer: lightning.Trainer,
        module: DiffusionModule,
        *,
        weights: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> tuple[int, str] | None:
        """Returns None, or what went wrong: an exit code and a sentence."""
        end = self.end
        assert end is not None
        if nonfinite := _not_finite(weights):
            return NONFINITE, (
                f"{nonfinite[0]} holds values that are not finite after step {end.step}, "
                f"{len(nonfinite)} tensors in all; nothing was saved, the last checkpoint is kept"
            )
        optimizer = trainer.optimizers[0]
        order = order_of(optimizer, module.trainable())
        state = {"loops": end.loops, "order": order, **state}
        facts = {
            "step": end.step,
            "micro_step": end.micro_step,
            "world_size": trainer.world_size,
            "threads": torch.get_num_threads(),  # the last bits of sums depend on it
            "optimizer": type(optimizer).__name__,
            "parent": self.parent,
            **self.facts,
        }
        try:
            made = write_checkpoint(self.root, weights=weights, state=state, facts=facts)
        except OSError as error:
            full = "the disk is full: " if error.errno in FULL else ""
            text = f"the checkpoint of step {end.step} was not written: {full}{error}"
            self.say(text)
            note_event(self.folder, "save_failed", step=end.step, reason=str(error))
            return DISK, text
        prune_checkpoints(self.root, self.keep, made.folder)
        return None

    def _state(self, trainer: lightning.Trainer) -> dict[str, Any]:
        """The states of optimiser, schedule and `parts`."""
        return {
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedule": _schedule(trainer).state_dict(),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }


def _schedule(trainer: lightning.Trainer) -> torch.optim.lr_scheduler.LambdaLR:
    found = trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(found, torch.optim.lr_scheduler.LambdaLR)
    return found


def _validates(trainer: lightning.Trainer) -> bool:
    """Whether validation runs after this micro-batch."""
    interval = trainer.val_check_batch
    seen = trainer.fit_loop.epoch_loop.batch_progress.total.ready
    return bool(trainer.enable_validation and interval and seen % interval == 0)


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors with values that are not finite (NaN or infinite)."""
    real = {name: value.detach() for name, value in tensors.items() if value.is_floating_point()}
    if torch.isfinite(torch.nn.utils.get_total_norm(list(real.values()), float("inf"))):
        return []
    return [name for name, value in real.items() if not torch.isfinite(value).all()]


@torch.no_grad()
def _fill(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], folder: Path) -> None:
    """Copies `stored` into `own` by name. Raises ValueError unless names and shapes agree."""
    missing, extra = sorted(set(own) - set(stored)), sorted(set(stored) - set(own))
    if missing or extra:
        raise ValueError(
            f"{folder} is a checkpoint of another recipe: it lacks {missing[:3] or 'nothing'}, and "
            f"has {extra[:3] or 'nothing'} that this recipe does not train"
        )
    for name, tensor in own.items():
        if tensor.shape != stored[name].shape:
            raise ValueError(
                f"{folder} is a checkpoint of another recipe: {name} is "
                f"{tuple(stored[name].shape)} there and {tuple(tensor.shape)} in this model"
            )
        tensor.copy_(as_sharded(stored[name], tensor))
