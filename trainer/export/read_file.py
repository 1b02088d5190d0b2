"""Reads one file of an adapter with everything in and beside it: layers, bundled words, and words
in `embeddings/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.export.bundle import Bundle
from trainer.export.peft_fields import Fields
from trainer.export.read_layers import read_layers
from trainer.export.read_tokens import bundled, read_beside
from trainer.export.tensor_files import load_tensors

Header = Callable[[Mapping[str, str]], Callable[[str], Fields]]


def read_file(file: Path | None, path: Path, base: Any, *, own: Header | None = None) -> Bundle:
    """What a file adds to the base, None where only words were trained.

    path: what the user gave, the file or its folder; own: from the file's header to the peft
    configuration of each layer, see `read_layers`.

    Raises:
        ValueError: as `load_tensors`, `read_layers` and `read_tokens`.
    """
    words = read_beside(path, base)
    if file is None:
        return words
    tensors, metadata = load_tensors(file)
    rest, bundle = bundled(tensors, base)
    fields = None if own is None else own(metadata)
    return read_layers(rest, base, fields) | bundle | words
