"""Short hashes of a loaded part: of its shapes, by which an adapter knows what it was trained on,
of its weights, of its settings, and of the code here that uses it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn


def shapes(module: nn.Module) -> str:
    """A short hash of all parameter shapes; names are left out, since transformers renames them
    between versions."""
    found = sorted(str(tuple(parameter.shape)) for parameter in module.parameters())
    return hashlib.sha256(" ".join(found).encode()).hexdigest()[:16]


def exact_contents(module: nn.Module) -> str:
    """A hash of the weights in the precision that they are held in."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()[:32]


def contents(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def settings(module: nn.Module) -> str:
    """A hash of what a module calculates with beside tensors: the class of each of its modules, and
    their numbers and switches, as the scale of an adapter on a layer."""
    digest = hashlib.sha256()
    for name, own in module.named_modules():
        plain = {key: _plain(value) for key, value in vars(own).items() if key != "training"}
        found = sorted((key, value) for key, value in plain.items() if value is not None)
        digest.update(f"{name} {type(own).__qualname__} {found}".encode())
    return digest.hexdigest()[:32]


def _plain(value: Any) -> str | None:
    """A number, a switch, or such by name or in a row; None for all else, as where a file lies."""
    if isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        named = {str(key): _plain(one) for key, one in value.items()}
        return None if None in named.values() else repr(sorted(named.items()))
    if isinstance(value, (list, tuple)):
        row = [_plain(one) for one in value]
        return None if None in row else repr(row)
    return None


@cache
def code() -> str:
    """A hash of the source of all backbones: how prompts become the tokens that an encoder reads,
    and which of its states are kept."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"{path.name} ".encode() + path.read_bytes())
    return digest.hexdigest()[:32]
