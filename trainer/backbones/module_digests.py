"""Short hashes of a loaded part: of its shapes, by which an adapter knows what it was trained on,
and of its weights."""

from __future__ import annotations

import hashlib

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
