"""Saves and restores a run: what `checkpoint.py` keeps in a folder, taken from and given back to
Lightning's loop.

The place a checkpoint stands for is always the end of an optimiser step. A resumed run has, from
there on, the weights, moments, average and draws of one that never stopped, bit for bit, where
software, ranks and devices are the same.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning
import numpy as np
import torch
from torch import Tensor

from trainer.common.exit_codes import DISK, NONFINITE, LeaveError
from trainer.runs.run_folder import note_event
from trainer.training.callbacks.ema import EMA
from trainer.training.callbacks.hang import HangGuard
from trainer.training.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from trainer.training.module import DiffusionModule

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Stateful(Protocol):
    """A part of the run with a state of its own, plain values and tensors."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Place:
    """The end of an optimiser step: counters of the loop, and what this rank would draw next."""

    step: int
    micro_step: int
    loops: dict[str, Any]
    draws: dict[str, Any]


class Checkpoints(lightning.Callback):
    """A checkpoint every `every` steps, 0 for none, after the last step, and where `save` is
    called; the `keep` newest stay.

    found: where this run goes on. parts: by name, saved beside weights and optimiser. facts: kept
    in every manifest. on_full: what a save that cannot be written does to the run. say: hears of
    it, on the first rank.
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
        ema: EMA | None,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.root = folder, folder / "checkpoints"
        self.every, self.keep, self.found, self.facts = every, keep, found, dict(facts)
        self.on_full, self.hang, self.ema, self.say = on_full, hang, ema, say
        self.parts: dict[str, Stateful] = {"ema": ema} if ema else {}
        self.place: Place | None = None
        self.saved = self.tried = found.step if found else 0
        self.parent = found.folder.name if found else None
        self._draws: dict[str, Any] | None = None

    def on_fit_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        step = self.found.step if self.found else 0
        if len(set(gather(trainer, step))) > 1:
            raise ValueError(
                f"the ranks do not see the same checkpoints in {self.root}; give run.out or run= a "
                "folder that all nodes share"
            )
        if self.found is not None:
            state = self._load(trainer, pl_module, self.found)
            trainer.lr_scheduler_configs[0].scheduler.load_state_dict(state["schedule"])
            trainer.fit_loop.load_state_dict(state["loops"])
            if len(state["draws"]) == trainer.world_size:
                self._draws = state["draws"][trainer.global_rank]

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        if self._draws is not None:
            set_draws(self._draws)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        step = trainer.global_step
        due = bool(self.every) and (step % self.every == 0 or step == trainer.max_steps)
        if step != self.tried and (due or _validates(trainer)):
            self._mark(trainer)
        if step != self.tried and due:
            self.tried = step
            problem = self.save(trainer, pl_module)
            if problem and self.on_full == "stop":
                raise LeaveError(
                    DISK, f"{problem}\nThe last checkpoint stands; make room and start again"
                )

    def save(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> str | None:
        """Writes the last step's end, if it is not written yet; every rank calls this at the same
        place. Returns what went wrong, on every rank.

        Raises:
            LeaveError: a trained value is no number; nothing was written.
        """
        assert isinstance(pl_module, DiffusionModule)
        if self.place is None or self.place.step != trainer.global_step:
            self._mark(trainer)
        assert self.place is not None
        if self.saved == self.place.step:
            return None
        if self.ema is not None:
            self.ema.take_back(pl_module)  # validation may have the average in the model
        with self.hang.inside("save"):
            draws = gather(trainer, self.place.draws)
            problem = None
            if trainer.is_global_zero:
                problem = self._write(trainer, pl_module, self.place, draws)
            problem = trainer.strategy.broadcast(problem)
        if problem is None:
            self.saved, self.parent = self.place.step, f"step-{self.place.step:06d}"
            return None
        code, text = problem
        if code == NONFINITE:
            raise LeaveError(code, text)
        return text

    def go_back(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> int:
        """Weights, optimiser and average of the newest checkpoint; the loop, the lr and the data
        stay where they are. Returns its step.

        Raises:
            LeaveError: there is none.
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
        self.place = Place(trainer.global_step, micro_step, loops, get_draws(trainer))

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
        optimizer.load_state_dict(state["optimizer"])
        if set(state["parts"]) != set(self.parts):
            raise ValueError(
                f"{found.folder} holds the state of {sorted(state['parts'])}, and this run has "
                f"{sorted(self.parts)}; keep optim.ema as it was, or choose another run.id"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        return state

    def _write(
        self,
        trainer: lightning.Trainer,
        module: DiffusionModule,
        place: Place,
        draws: list[dict[str, Any]],
    ) -> tuple[int, str] | None:
        """What went wrong: an exit code and a sentence."""
        weights = module.stored()
        if unsound := _unsound(weights):
            return NONFINITE, (
                f"{unsound[0]} holds values that are not finite after step {place.step}, "
                f"{len(unsound)} tensors in all; nothing was saved, the last checkpoint stands"
            )
        optimizer = trainer.optimizers[0]
        state = {
            "loops": place.loops,
            "draws": draws,
            "optimizer": optimizer.state_dict(),
            "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        facts = {
            "step": place.step,
            "micro_step": place.micro_step,
            "world_size": trainer.world_size,
            "optimizer": type(optimizer).__name__,
            "parent": self.parent,
            **self.facts,
        }
        try:
            made = write_checkpoint(self.root, weights, state, facts)
        except OSError as error:
            full = "the disk is full: " if error.errno in FULL else ""
            text = f"the checkpoint of step {place.step} was not written: {full}{error}"
            self.say(text)
            note_event(self.folder, "save_failed", step=place.step, reason=str(error))
            return DISK, text
        prune_checkpoints(self.root, self.keep, made.folder)
        return None


def gather(trainer: lightning.Trainer, own: Any) -> list[Any]:
    """The plain value of every rank, on every rank."""
    if trainer.world_size == 1:
        return [own]
    everyone: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def get_draws(trainer: lightning.Trainer) -> dict[str, Any]:
    """The states of this rank's random number generators, as torch reads them with weights_only."""
    legacy = np.random.get_state(legacy=False)
    place = {**legacy["state"], "key": torch.from_numpy(legacy["state"]["key"].astype(np.int64))}
    draws = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": {**legacy, "state": place},
    }
    device = trainer.strategy.root_device
    return draws | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_draws(draws: Mapping[str, Any]) -> None:
    torch.set_rng_state(draws["torch"])
    version, numbers, gauss = draws["python"]
    random.setstate((version, tuple(numbers), gauss))
    place = draws["numpy"]["state"]
    place = {**place, "key": place["key"].numpy().astype(np.uint32)}
    np.random.set_state({**draws["numpy"], "state": place})
    if "cuda" in draws and torch.cuda.is_available():
        torch.cuda.set_rng_state(draws["cuda"])


def _validates(trainer: lightning.Trainer) -> bool:
    """Whether the validation loss is taken after this micro-batch."""
    interval = trainer.val_check_batch
    seen = trainer.fit_loop.epoch_loop.batch_progress.total.ready
    return bool(trainer.enable_validation and interval and seen % interval == 0)


def _unsound(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold values that are not finite."""
    real = {name: value.detach() for name, value in tensors.items() if value.is_floating_point()}
    if torch.isfinite(torch.nn.utils.get_total_norm(list(real.values()), float("inf"))):
        return []
    return [name for name, value in real.items() if not torch.isfinite(value).all()]


@torch.no_grad()
def _fill(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], folder: Path) -> None:
    """Copies by name, after the names and shapes were compared both ways."""
    missing, extra = sorted(set(own) - set(stored)), sorted(set(stored) - set(own))
    if missing or extra:
        raise ValueError(
            f"{folder} is a checkpoint of another recipe: it lacks {missing[:3] or 'nothing'}, and "
            f"has unasked {extra[:3] or 'nothing'}"
        )
    for name, tensor in own.items():
        if tensor.shape != stored[name].shape:
            raise ValueError(
                f"{folder} is a checkpoint of another recipe: {name} is "
                f"{tuple(stored[name].shape)} there and {tuple(tensor.shape)} in this model"
            )
        tensor.copy_(stored[name])
