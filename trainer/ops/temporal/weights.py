"""Weights of motion modules, read from files of other tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from trainer.common import pickles
from trainer.common.adapter_header import HEADER
from trainer.common.paths import shipped
from trainer.ops.temporal.motion_names import MARK

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel

# the files of a folder of weights: a run of ours, diffusers' MotionAdapter
FILES = ("adapter.safetensors", "diffusion_pytorch_model.safetensors")
NORM = "motion_norm"  # of exported files: what the modules' group norm is over, frame or clip


@torch.no_grad()
def read_weights(
    model: AttentionModel,
    paths: Sequence[str],
    where: str,
    spelling: Callable[[str], str] | None = None,
) -> None:
    """Copies trained blocks into those at `paths` from an adapter of ours or the folder of a
    MotionAdapter; what else an adapter of ours holds stays behind.

    spelling: from what another writer calls a tensor to our name of it.

    Raises:
        ValueError: there is no such file, or it holds other blocks than these.
    """
    stored = _stored(where)
    stored = {key.removeprefix(f"{model.denoiser_name}."): value for key, value in stored.items()}
    if spelling is not None:
        stored = {spelling(key): value for key, value in stored.items()}
    inside = tuple(f"{path}." for path in paths)
    wanted = {n: p for n, p in model.denoiser.named_parameters() if n.startswith(inside)}
    buffers = {name for name, _ in model.denoiser.named_buffers()}
    # what blocks of this kind are called, as in `motion_modules`
    marks = {path.rstrip(".0123456789").rpartition(".")[2] for path in paths}
    extra = [
        name
        for name in stored
        if name not in wanted and name not in buffers and marks & set(name.split("."))
    ]
    if missing := [name for name in wanted if name not in stored]:
        raise ValueError(f"weights={where}: it lacks {missing[0]}, {len(missing)} tensors in all")
    if extra:
        raise ValueError(
            f"weights={where}: it holds {extra[0]}, {len(extra)} tensors in all, for which the "
            "blocks of these options have no parameter; give the options it was trained with"
        )
    for name, parameter in wanted.items():
        _copy(name, stored[name], into=parameter, where=where)


def trained_per_frame(where: str) -> bool:
    """Whether the group norm of the motion modules in a file was over each frame by itself when
    they trained, and not over all frames of a clip: as the file says, or the recipe in its header,
    or else where it has the names of AnimateDiff's released code.

    Raises:
        ValueError: there is no such file, or it is no safetensors.
    """
    with _opening(where) as path, safe_open(path, "pt") as file:
        names, facts = list(file.keys()), file.metadata() or {}
    if NORM in facts:
        return bool(facts[NORM] == "frame")
    if HEADER not in facts:
        return any(MARK in name for name in names)
    own: dict[str, Any] = json.loads(facts[HEADER])["recipe"]["methods"].get("animatediff") or {}
    if own.get("norm") is None and own.get("weights") is not None:
        return trained_per_frame(own["weights"])
    return bool(own.get("norm") == "frame")


def _stored(where: str) -> dict[str, Tensor]:
    """The tensors of the file, which must be safetensors."""
    with _opening(where) as path:
        return load_file(path)


@contextmanager
def _opening(where: str) -> Iterator[Path]:
    """The file, which must be safetensors."""
    file = weights_file(where)
    if file.suffix in pickles.SUFFIXES:
        raise ValueError(f"weights={where}: {pickles.refusal(file)}")
    try:
        yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"weights={where}: not a safetensors file ({error}); pickles are never loaded"
        ) from None


def _copy(name: str, value: Tensor, *, into: Tensor, where: str) -> None:
    if value.shape != into.shape:
        raise ValueError(
            f"weights={where}: {name} is {tuple(value.shape)} there and {tuple(into.shape)} here; "
            "it was trained for another backbone"
        )
    into.copy_(value)


def weights_file(where: str) -> Path:
    """The file itself, or the one in a folder, which may be one that ships."""
    path = shipped(where)
    tried = [path / name for name in FILES] if path.is_dir() else [path]
    found = [file for file in tried if file.is_file()]
    if not found:
        raise ValueError(f"weights={where}: no such file, nor a folder with {' or '.join(FILES)}")
    return found[0]
