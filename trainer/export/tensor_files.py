"""Safetensors files of other tools: read with a clear message for everything that can be wrong with
them, and written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.common import pickles


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    dtype: torch.dtype,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file of tensors in `dtype`; single numbers such as `.alpha` stay in fp32.

    metadata: more entries of the header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = {
        key: value.detach().cpu().to(dtype if value.ndim else torch.float32).contiguous()
        for key, value in tensors.items()
    }
    save_file(rounded, path, {"format": "pt", **(metadata or {})})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors in fp32, and the header's entries.

    Raises:
        ValueError: there is no such file, it is a pickle or otherwise not safetensors, or it holds
            a value that is not finite.
    """
    if not path.is_file():
        raise ValueError(f"file={path}: no such file")
    if path.suffix in pickles.SUFFIXES:
        raise ValueError(f"file={path}: {pickles.refusal(path)}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = {key: value.float() for key, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"file={path}: not a safetensors file ({error})") from None
    broken = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(
            f"file={path}: {broken[0]} holds values that are not finite, {len(broken)} such "
            "tensors in all; the file is damaged or its training diverged"
        )
    return tensors, metadata
