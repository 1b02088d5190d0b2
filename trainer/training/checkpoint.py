"""Checkpoints that are whole or not there: a folder each, written beside its name and renamed.

    checkpoints/step-000120/weights.safetensors   what the base cannot give back, by name
                            state.pt              optimiser, EMA, place in the run; plain tensors
                            manifest.json         bytes and sha256 of both, versions, ranks, parent

Every file and both folders are on the disk before the name is. A folder under its final name that
does not match its manifest was damaged later; it is never loaded.

A run waits for all of that. An adapter has hundreds of small tensors and few bytes, so the time is
in the tensors, 0.1 ms each in `torch.save`, and in waiting for the disk file by file: small tensors
of the state are laid end to end in one, and the files are waited for together.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
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

CHECKPOINT_FORMAT = "attention-trainer-checkpoint-1"
WEIGHTS, STATE, MANIFEST = "weights.safetensors", "state.pt", "manifest.json"
CHECKPOINT_NAME = re.compile(r"step-(\d{6,})")
LIBRARIES = ("torch", "lightning", "safetensors")
SPARE = 2**20  # bytes left free beside a checkpoint, and a tenth of it
SMALL = 2**14  # values: tensors of at most so many are kept end to end


class DamagedError(ValueError):
    """A checkpoint that does not match its manifest; the message names the first thing wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. manifest: what `write` was told, and what it added."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.manifest["step"])

    @property
    def micro_step(self) -> int:
        """Micro-batches trained: where the data goes on."""
        return int(self.manifest["micro_step"])


def write_checkpoint(
    root: Path, weights: Mapping[str, Tensor], state: Mapping[str, Any], facts: Mapping[str, Any]
) -> Checkpoint:
    """Writes `root/step-<facts["step"]>`; one of the same name is replaced by it.

    Raises:
        OSError: it was not written, and nothing else has changed. ENOSPC also where the disk has
            no room for it, before a byte is written.
    """
    root.mkdir(parents=True, exist_ok=True)
    _check_room(root, size_of(weights) + size_of(state))
    name = f"step-{facts['step']:06d}"
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
    """All checkpoints of a run, the newest first, whole or not."""
    found = [
        path
        for path in root.glob("step-*")
        if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("step-")))


def newest_checkpoint(
    root: Path, say: Callable[[str], None], tidy: bool = False
) -> Checkpoint | None:
    """The newest checkpoint that is whole; `say` hears of each damaged one that is passed over.

    tidy: damaged ones are set aside as `step-<step>.damaged`, and what a killed run left half
    written is removed; only one process may do that.

    Raises:
        LeaveError: there are checkpoints, and none is whole.
        ValueError: there is one of an earlier version.
    """
    if tidy:
        for left in root.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)
    folders = every_checkpoint(root)
    for number, folder in enumerate(folders):
        try:
            found = verified(folder)
        except DamagedError as error:
            say(f"checkpoint {folder} is damaged and passed over: {error}")
            continue
        if tidy:
            _set_aside(folders[:number])
        return found
    if folders:
        raise LeaveError(
            DAMAGED,
            f"none of the {len(folders)} checkpoints in {root} is whole, so the run cannot go on; "
            "remove that folder to train from the start",
        )
    if (root / "last.ckpt").is_file():
        raise ValueError(
            f"{root / 'last.ckpt'} is a checkpoint of an earlier version, which cannot be gone on "
            "with; finish the run with that version, or choose another run.id"
        )
    return None


def verified(folder: Path) -> Checkpoint:
    """The checkpoint, after every byte of it was read.

    Raises:
        DamagedError: a part is missing, shorter or longer, or has changed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DamagedError(f"{MANIFEST} is missing or not readable") from None
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _seal(manifest):
        raise DamagedError(f"{MANIFEST} has changed")
    if manifest.get("format") != CHECKPOINT_FORMAT or f"step-{manifest['step']:06d}" != folder.name:
        raise DamagedError(
            f"{MANIFEST} is of {manifest.get('format')}, step {manifest.get('step')}; "
            f"{CHECKPOINT_FORMAT} of the step in its name is read here"
        )
    for name in (WEIGHTS, STATE):
        _check(folder / name, manifest["files"][name])
    return Checkpoint(folder, manifest)


def read_checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its weights and its state, on the CPU; no pickled code is run.

    Raises:
        LeaveError: the state holds more than tensors and plain values.
    """
    path = checkpoint.folder / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LeaveError(
            DAMAGED,
            f"{path} holds more than tensors and plain values, which no checkpoint does; remove "
            f"{checkpoint.folder} to go on from the one before",
        ) from error
    return load_file(checkpoint.folder / WEIGHTS), _together(state)


def prune_checkpoints(root: Path, keep: int, safe: Path) -> None:
    """Removes all but the `keep` newest, and never `safe`, which has just been verified."""
    for folder in every_checkpoint(root)[keep:]:
        if folder != safe:
            gone = folder.with_name(f".{folder.name}.gone")  # never half there under its name
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
    except SafetensorError as error:  # a full disk, said in a way of its own
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from None


def _write_state(path: Path, state: Mapping[str, Any]) -> None:
    try:
        with path.open("wb") as file:
            torch.save(_apart(state), file)
    except RuntimeError as error:  # torch stumbles once more over what the write has raised
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _apart(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with its small tensors end to end under `small`, one tensor of each type, and where
    they were under `places`: path, type and shape of each, as text."""
    values: dict[str, list[Tensor]] = {}
    places: list[tuple[tuple[Any, ...], str, list[int]]] = []

    def without(tree: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(tree, Mapping):
            return {key: without(value, (*path, key)) for key, value in tree.items()}
        if isinstance(tree, list):
            return [without(value, (*path, i)) for i, value in enumerate(tree)]
        if not isinstance(tree, Tensor) or tree.numel() > SMALL or not tree.is_contiguous():
            return tree
        kind = str(tree.dtype)
        values.setdefault(kind, []).append(tree.detach().cpu().flatten())
        places.append((path, kind, list(tree.shape)))
        return None

    large = without(state, ())
    small = {kind: torch.cat(those) for kind, those in values.items()}
    return {**large, "small": small, "places": json.dumps(places)}


def _together(state: dict[str, Any]) -> dict[str, Any]:
    """What `_apart` was given."""
    small, taken = state.pop("small", {}), dict[str, int]()
    for path, kind, shape in json.loads(state.pop("places", "[]")):
        start = taken.get(kind, 0)
        taken[kind] = start + math.prod(shape)
        *above, last = path
        tree: Any = state
        for key in above:
            tree = tree[key]
        tree[last] = small[kind][start : taken[kind]].view(shape).clone()
    return state


def _facts(path: Path) -> dict[str, Any]:
    """Bytes and sha256 of a file, as they are read back."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sync(paths: Sequence[Path]) -> None:
    """Waits for files and folders to be on the disk, for all at once: a file system writes down
    together what is asked of it together."""
    with ThreadPoolExecutor(len(paths)) as pool:
        list(pool.map(_sync_one, paths))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
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
