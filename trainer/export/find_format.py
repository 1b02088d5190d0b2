"""Formats by name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def format_names() -> list[str]:
    """Every form there is, by file name."""
    files = (Path(__file__).parent / "formats").glob("*.py")
    return sorted(path.stem for path in files if not path.stem.startswith("_"))


def find_format(name: str) -> Any:
    """The file of a form.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in format_names():
        raise ValueError(f"format={name}: no such format; there are: {', '.join(format_names())}")
    return importlib.import_module(f"trainer.export.formats.{name}")
