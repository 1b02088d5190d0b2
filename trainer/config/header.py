"""The header of an adapter: the recipe that made it, and the backbone it was made for. Reading it
needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trainer.common.adapter_header import HEADER
from trainer.common.paths import shipped

ADAPTER_FORMAT = "attention-trainer-adapter-1"


def file_of(name: str | Path) -> Path:
    """The adapter in a run folder, the adapter that ships under a name, or the file itself."""
    path = shipped(name)
    return path / "adapter.safetensors" if path.is_dir() else path


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The resolved recipe and the backbone's identity, without reading a tensor.

    Raises:
        ValueError: the file is missing, no safetensors, or not an adapter of ours.
    """
    if not path.is_file():
        raise ValueError(f"adapter={path}: no such file")
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"adapter={path}: not a safetensors file ({error}); pickles are never loaded"
        ) from None
    if HEADER not in metadata:
        raise ValueError(
            f"adapter={path}: its header has no {HEADER!r}, so it is not an adapter of ours"
        )
    try:
        facts = json.loads(metadata[HEADER])
        if facts.get("format") != ADAPTER_FORMAT:
            raise ValueError(
                f"adapter={path}: its header has the format {facts.get('format')!r}; "
                f"an adapter of ours has {ADAPTER_FORMAT!r}"
            )
        tree, identity = facts["recipe"], facts["backbone"]
        tree["methods"], identity["name"]
        if not isinstance(tree["backbone"], str):
            raise TypeError
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(
            f"adapter={path}: its header holds no complete recipe; save it again"
        ) from None
    return tree, identity
