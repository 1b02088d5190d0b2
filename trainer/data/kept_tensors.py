"""Tensors by name in a verified file, found by a text: one that is cut, altered, or in another
one's place is as if it were not there."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.common.atomic import written_atomically
from trainer.data.latent_cache import checksum

SUM = "sum"  # the entry of a file's header that holds its checksum


def write_tensors(folder: Path, text: str, tensors: Mapping[str, Tensor]) -> None:
    """folder: named after all that the tensors depend on beside the text."""
    path = tensors_file(folder, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as part:
        own = {name: value.contiguous() for name, value in tensors.items()}
        save_file(own, part, {SUM: _sum(folder, text, tensors)})


def read_tensors(folder: Path, text: str) -> Mapping[str, Tensor] | None:
    """None where there is no file, or not the one that was written for this text."""
    try:
        with safe_open(tensors_file(folder, text), "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            same = (file.metadata() or {}).get(SUM) == _sum(folder, text, found)
    except (OSError, SafetensorError):
        return None
    return found if same else None


def tensors_file(folder: Path, text: str) -> Path:
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    return folder / name[:2] / f"{name}.safetensors"


def _sum(folder: Path, text: str, found: Mapping[str, Tensor]) -> str:
    """A CRC-32 of the folder's name, the text, and every tensor."""
    total = zlib.crc32(f"{folder.name} {text}".encode())
    for name, value in sorted(found.items()):
        total = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), total)
        total = checksum(_raw(value), total)
    return f"{total:08x}"


def _raw(value: Tensor) -> np.ndarray:
    return value.contiguous().flatten().view(torch.uint8).numpy()
