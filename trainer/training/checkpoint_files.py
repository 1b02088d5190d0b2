"""Checkpoints, a folder each. A folder gets its final name only when it is complete.

    checkpoints/step-000120/weights.safetensors   trained and kept tensors, by name
                            state.pt              optimiser, EMA, counters, random number generators
                            manifest.json         bytes and sha256 of both, versions, ranks, parent

All files are flushed to the disk (`fsync`) before the folder is renamed. A folder under its final
name that does not match its manifest was damaged afterwards; it is never loaded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.common.exit_codes import DAMAGED, LeaveError
from trainer.runs.run_folder import step_name

CHECKPOINT_FORMAT = "attention-trainer-checkpoint-2"
EARLIER_FORMATS = ("attention-trainer-checkpoint-1",)
WEIGHTS, STATE, MANIFEST = "weights.safetensors", "state.pt", "manifest.json"
CHECKPOINT_NAME = re.compile(r"step-(\d{6,})")
LIBRARIES = ("torch", "lightning", "safetensors")
SPARE = 2**20  # bytes left free beside a checkpoint, and a tenth of it


class DamagedError(ValueError):
    """A checkpoint that does not match its manifest; the message names the first thing wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. manifest: the facts given to `write_checkpoint`, and what it added."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.manifest["step"])

    @property
    def micro_step(self) -> int:
        """Micro-batches trained: the data resumes at this one."""
        return int(self.manifest["micro_step"])


def write_checkpoint(
    root: Path, weights: Mapping[str, Tensor], state: Mapping[str, Any], facts: Mapping[str, Any]
) -> Checkpoint:
    """Writes `root/step-<facts["step"]>`, and replaces an earlier folder of that name.

    Args:
        weights: tensors by name.
        state: tensors and plain values in nested mappings and lists.
        facts: plain values for the manifest; `step` and `micro_step` are required.

    Raises:
        OSError: the checkpoint was not written, and nothing else has changed. Its errno is ENOSPC
            if the disk has too little room, which is checked before the first byte is written.
    """
    root.mkdir(parents=True, exist_ok=True)
    _check_room(root, size_of(weights) + size_of(state))
    name = step_name(facts["step"])
    part = root / f".{name}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        _write_weights(part / WEIGHTS, weights)
        _write_state(part / STATE, state)
        manifest = {
            "format": CHECKPOINT_FORMAT,
            **facts,
            "versions": _versions(),
            "files": {file: _facts(part / file) for file in (WEIGHTS, STATE)},
        }
        sealed = {**manifest, "sha256": _seal(manifest)}
        (part / MANIFEST).write_text(json.dumps(sealed, indent=1), encoding="utf-8")
        _sync([part / WEIGHTS, part / STATE, part / MANIFEST, part])
        _put(part, root / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Checkpoint(root / name, manifest)


def every_checkpoint(root: Path) -> list[Path]:
    """The folders of all checkpoints of a run, newest first; damaged ones are included."""
    found = [
        path
        for path in root.glob("step-*")
        if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("step-")))


def newest_checkpoint(
    root: Path, say: Callable[[str], None], tidy: bool = False
) -> Checkpoint | None:
    """The newest checkpoint that is complete and undamaged, or None if there is no checkpoint.

    Args:
        say: is called with one sentence for each damaged checkpoint that is skipped.
        tidy: rename damaged checkpoints to `step-<step>.damaged`, and remove what a killed run
            left half written. Only one process may do that.

    Raises:
        LeaveError: all checkpoints are damaged.
        ValueError: an earlier version of the trainer wrote one in a format not read any more.
    """
    if tidy:
        for left in root.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)
    folders = every_checkpoint(root)
    for number, folder in enumerate(folders):
        try:
            found = verified(folder)
        except DamagedError as error:
            say(f"checkpoint {folder} is damaged and is skipped: {error}")
            continue
        if tidy:
            _set_aside(folders[:number])
        return found
    if folders:
        raise LeaveError(
            DAMAGED,
            f"all {len(folders)} checkpoints in {root} are damaged, so the run cannot resume; "
            "remove that folder to train from the start",
        )
    if (root / "last.ckpt").is_file():
        raise _too_old(root / "last.ckpt")
    return None


def verified(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, after every byte of it was read and compared with its manifest.

    Raises:
        DamagedError: a file is missing, has another size, or has changed.
        ValueError: an earlier version of the trainer wrote it, in a format not read any more.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DamagedError(f"{MANIFEST} is missing or not readable") from None
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _seal(manifest):
        raise DamagedError(f"{MANIFEST} has changed")
    if manifest.get("format") in EARLIER_FORMATS:
        raise _too_old(folder)
    if manifest.get("format") != CHECKPOINT_FORMAT or step_name(manifest["step"]) != folder.name:
        raise DamagedError(
            f"{MANIFEST} has the format {manifest.get('format')} and step {manifest.get('step')}; "
            f"expected are {CHECKPOINT_FORMAT} and the step in the folder's name"
        )
    for name in (WEIGHTS, STATE):
        _check(folder / name, manifest["files"][name])
    return Checkpoint(folder, manifest)


def read_checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the state of a checkpoint, on the CPU. No pickled code is run.

    Raises:
        LeaveError: the state contains something else than tensors and plain values.
    """
    path = checkpoint.folder / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LeaveError(
            DAMAGED,
            f"{path} contains something else than tensors and plain values, so this trainer did "
            f"not write it; remove {checkpoint.folder} to resume from the checkpoint before it",
        ) from error
    return load_file(checkpoint.folder / WEIGHTS), state


def prune_checkpoints(root: Path, keep: int, safe: Path) -> None:
    """Removes all checkpoints but the `keep` newest; never removes `safe`."""
    for folder in every_checkpoint(root)[keep:]:
        if folder != safe:
            # renamed first, so that no half-removed folder ever has the name of a checkpoint
            gone = folder.with_name(f".{folder.name}.gone")
            os.replace(folder, gone)
            shutil.rmtree(gone, ignore_errors=True)


def size_of(tree: Any) -> int:
    """Bytes of all tensors in a tree of mappings and sequences."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, Mapping):
        return sum(map(size_of, tree.values()))
    return sum(map(size_of, tree)) if isinstance(tree, list | tuple) else 0


@cache
def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def _check(path: Path, facts: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise DamagedError(f"{path.name} is missing")
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise DamagedError(f"{path.name} has {size} bytes and had {facts['bytes']}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
            raise DamagedError(f"{path.name} has changed: its sha256 is not the manifest's")


def _too_old(place: Path) -> ValueError:
    return ValueError(
        f"{place} is a checkpoint of an earlier version of the trainer, in a format that this "
        "version does not read; finish the run with that version, or choose another run.id"
    )


def _check_room(root: Path, needed: int) -> None:
    needed += needed // 10 + SPARE
    free = shutil.disk_usage(root).free
    if free < needed:
        message = f"a checkpoint needs {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free"
        raise OSError(errno.ENOSPC, message, str(root))


def _write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    try:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in weights.items()}, path
        )
    except SafetensorError as error:  # how safetensors reports a full disk
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from None


def _write_state(path: Path, state: Mapping[str, Any]) -> None:
    try:
        with path.open("wb") as file:
            torch.save(dict(state), file)
    except RuntimeError as error:  # torch raises this on top of the error of the write itself
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _facts(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file, read back from the disk."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sync(paths: Sequence[Path]) -> None:
    """Flushes files and folders to the disk, in parallel: the file system can then merge writes."""
    with ThreadPoolExecutor(len(paths)) as pool:
        list(pool.map(_sync_one, paths))


def _sync_one(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folder
        return
    # Windows flushes only what may be written
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(part: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        os.replace(final, old)
    os.replace(part, final)
    _sync_one(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _set_aside(damaged: Sequence[Path]) -> None:
    for folder in damaged:
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
