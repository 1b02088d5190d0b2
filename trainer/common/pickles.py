"""Pickles can run code when they are opened, so none of a stranger is: what is said instead."""

from __future__ import annotations

from pathlib import Path

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refusal(path: Path) -> str:
    """Why a file with such a suffix is not read, and the command that makes safetensors of it.

    Trainers put a network's tensors at the top or under `state_dict`.
    """
    return (
        "a pickle, which can run code when it is opened, so it is never loaded; where you trust "
        f'it, convert it once: python -c "import torch, safetensors.torch as s; d = '
        f"torch.load('{path.name}', weights_only=True); s.save_file({{k: v.contiguous() for k, v "
        f"in d.get('state_dict', d).items() if hasattr(v, 'shape')}}, '{path.stem}.safetensors')\""
    )
