"""Pickles can run code when they are opened, so none of a stranger is: what is said instead."""

from __future__ import annotations

from pathlib import Path

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refusal(path: Path) -> str:
    """Why a file with such a suffix is not read, and the command that makes safetensors of it.

    Trainers put a network's tensors at the top or under `state_dict`, and the vectors of an
    embedding under `string_to_param`.
    """
    return (
        "a pickle, which can run code when it is opened, so it is never loaded; where you trust "
        f'it, convert it once: python -c "import torch, safetensors.torch as s; d = '
        f"torch.load('{path.name}', weights_only=True); d = d.get('string_to_param', "
        f"d.get('state_dict', d)); s.save_file({{k: v.contiguous() for k, v in d.items() "
        f"if hasattr(v, 'shape')}}, '{path.stem}.safetensors')\""
    )
