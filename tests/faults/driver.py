"""`fit` with a fault in it, in a process of its own:

    python tests/faults/driver.py '{"nan": {"step": 1, "rank": 1}}' recipe=custom_diffusion ...

Each function below is a fault by its name; what is between a fault and the exit code is the real
program.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.__main__ import main
from trainer.data.loader import Planned
from trainer.training import checkpoint_files as checkpoint
from trainer.training.callbacks import preview as preview_file
from trainer.training.callbacks import save_and_restore
from trainer.training.module import DiffusionModule
from trainer.training.tasks import denoise as denoise_file
from trainer.training.tasks.denoise import Denoise
from trainer.training.trackers import wandb_runs

Patch = Callable[[Any, str, Any], None]


def install(faults: Mapping[str, Mapping[str, Any]], patch: Patch = setattr) -> None:
    for name, options in faults.items():
        globals()[name](patch, **options)


def nan(patch: Patch, **where: int) -> None:
    """The loss is no number."""
    _in_step(patch, lambda module, loss: loss * float("nan"), **where)


def inf(patch: Patch, **where: int) -> None:
    """The loss is fine, one gradient is infinite."""

    def act(module: DiffusionModule, loss: torch.Tensor) -> torch.Tensor:
        parameter = next(iter(module.trainable().values()))
        handle = parameter.register_hook(lambda gradient: _spoiled(gradient, handle))
        return loss

    _in_step(patch, act, **where)


def _spoiled(gradient: torch.Tensor, handle: Any) -> torch.Tensor:
    handle.remove()
    spoiled = gradient.clone()
    spoiled.view(-1)[0] = float("inf")
    return spoiled


def signals(patch: Patch, numbers: list[int], **where: int) -> None:
    """The process gets signals inside a step."""

    def act(module: DiffusionModule, loss: torch.Tensor) -> torch.Tensor:
        for number in numbers:
            os.kill(os.getpid(), number)
        return loss

    _in_step(patch, act, **where)


def signal_in_validation(patch: Patch, number: int, step: int) -> None:
    original = DiffusionModule.validation_step

    def validation_step(self: DiffusionModule, batch: Any, batch_index: int) -> None:
        original(self, batch, batch_index)
        if self.global_step == step:
            os.kill(os.getpid(), number)

    patch(DiffusionModule, "validation_step", validation_step)


def signal_in_save(patch: Patch, number: int, save: int) -> None:
    _before(patch, "_write_state", save, number)


def kill_in_save(patch: Patch, function: str, call: int) -> None:
    """SIGKILL right before a part of a save; call: which one, from 1."""
    _before(patch, function, call, signal.SIGKILL)


def sleep(patch: Patch, seconds: float, **where: int) -> None:
    def act(module: DiffusionModule, loss: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds)
        return loss

    _in_step(patch, act, **where)


def sleep_in_data(patch: Patch, seconds: float, step: int) -> None:
    original = Planned.__getitem__

    def getitem(self: Planned, index: int) -> Any:
        if index == step:
            time.sleep(seconds)
        return original(self, index)

    patch(Planned, "__getitem__", getitem)


def sleep_in_save(patch: Patch, seconds: float, save: int) -> None:
    original, calls = checkpoint._write_state, [0]

    def write(*arguments: Any) -> None:
        original(*arguments)
        calls[0] += 1
        if calls[0] == save:
            time.sleep(seconds)

    patch(checkpoint, "_write_state", write)


def signal_worker(patch: Patch, number: int, **where: int) -> None:
    """One of the data workers gets a signal: SIGKILL ends it, SIGSTOP makes it hang."""

    def act(module: DiffusionModule, loss: torch.Tensor) -> torch.Tensor:
        pid = multiprocessing.active_children()[0].pid
        assert pid is not None
        os.kill(pid, number)
        return loss

    _in_step(patch, act, **where)


def largest_file(patch: Patch, size: int) -> None:
    """No file of this process gets larger: a write fails as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def trace(patch: Patch, folder: str) -> None:
    """No fault: each rank writes down what it trains on and meets, a line a sample."""
    encode, loss, noises = Denoise.encode, Denoise.loss, list[str]()
    purposes = [""]

    def encoded(self: Denoise, batch: Any, purpose: Any = "train") -> Any:
        noises.clear()
        purposes[0] = purpose
        return encode(self, batch, purpose)

    def seen(self: Denoise, state: Any) -> Any:
        result, batch = loss(self, state), state.batch
        if purposes[0] == "train":
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            names = ("place", "key", "timestep", "noise", "loss")
            timesteps, losses = state.t.tolist(), result.losses.tolist()
            values = (batch.positions, batch.keys, timesteps, noises, losses)
            with (Path(folder) / f"seen-{rank}.jsonl").open("a") as file:
                for row in zip(*values, strict=True):
                    facts = {"step": batch.step, **dict(zip(names, row, strict=True))}
                    file.write(json.dumps(facts) + "\n")
        return result

    draw = denoise_file.three_normals

    def drawn(*arguments: Any) -> torch.Tensor:
        noise = draw(*arguments)
        noises.append(hashlib.sha256(noise.numpy().tobytes()).hexdigest()[:16])
        return noise

    patch(denoise_file, "three_normals", drawn)
    patch(Denoise, "encode", encoded)
    patch(Denoise, "loss", seen)


def lead(patch: Patch) -> None:
    """The process and what it starts are a group of their own, as under a terminal."""
    os.setpgid(0, 0)


def kill_server(patch: Patch, pid: int, **where: int) -> None:
    """wandb's server is gone, once the run has begun there."""

    def act(module: DiffusionModule, loss: torch.Tensor) -> torch.Tensor:
        import wandb

        until = time.monotonic() + 60  # it begins in a thread of its own
        while wandb.run is None and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        return loss

    _in_step(patch, act, **where)


def impatient(patch: Patch, seconds: float) -> None:
    """The end of the run waits for wandb's uploads for so long."""
    patch(wandb_runs, "UPLOADS", seconds)


def preview(patch: Patch, error: str, call: int) -> None:
    """The sampling of previews raises from its `call`-th call on."""
    _raising(patch, preview_file.Preview, "_sample", error=error, call=call)


def validation(patch: Patch, error: str, call: int) -> None:
    _raising(patch, Denoise, "score", error=error, call=call)


def _raising(patch: Patch, owner: Any, name: str, *, error: str, call: int) -> None:
    """error: "memory" for that of a GPU without room, or a message."""
    original, calls = getattr(owner, name), [0]

    def raising(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] < call:
            return original(*arguments, **options)
        if error == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nmore")
        raise RuntimeError(error)

    patch(owner, name, raising)


def fail(patch: Patch, **where: int) -> None:
    def act(module: DiffusionModule, loss: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"a fault of this rank alone, at {time.monotonic()}")

    _in_step(patch, act, **where)


def _in_step(
    patch: Patch,
    act: Callable[[DiffusionModule, torch.Tensor], torch.Tensor],
    step: int,
    rank: int = 0,
    last: int | None = None,
) -> None:
    """act: called with the loss of optimiser steps `step` to `last`, on one rank."""
    original = DiffusionModule.training_step

    def training_step(self: DiffusionModule, batch: Any, batch_index: int) -> torch.Tensor:
        loss = original(self, batch, batch_index)
        here = step <= self.global_step <= (step if last is None else last)
        return act(self, loss) if here and self.global_rank == rank else loss

    patch(DiffusionModule, "training_step", training_step)


def _before(patch: Patch, function: str, call: int, number: int) -> None:
    original, calls = getattr(checkpoint, function), [0]

    def wrapped(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return original(*arguments)

    for module in (checkpoint, save_and_restore):
        if hasattr(module, function):
            patch(module, function, wrapped)


def forked(
    faults: Mapping[str, Mapping[str, Any]],
    words: list[str],
    said: Path,
    environment: Mapping[str, str],
) -> None:
    """`run` in a process that was forked where all is imported; said: the file of its stderr."""
    from commands import take_rank  # which a new process does not find

    os.environ.clear()
    os.environ.update(environment)
    take_rank(environment)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    run(faults, words)


def run(faults: Mapping[str, Mapping[str, Any]], words: list[str]) -> None:
    install(faults)
    code = main(["fit", *words])
    sys.stdout.flush()
    sys.exit(code)


if __name__ == "__main__":
    try:
        run(json.loads(sys.argv[1]), sys.argv[2:])
    finally:
        gc.freeze()  # as `python -m trainer` does
