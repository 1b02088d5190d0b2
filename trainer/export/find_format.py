"""Formats by name."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path

from trainer.export.formats import Format


@cache
def format_names() -> tuple[str, ...]:
    """The names of all formats, which are those of their files."""
    files = (Path(__file__).parent / "formats").glob("*.py")
    return tuple(sorted(path.stem for path in files if not path.stem.startswith("_")))


def find_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in format_names():
        raise ValueError(f"format={name}: no such format; there are: {', '.join(format_names())}")
    found: Format = importlib.import_module(f"trainer.export.formats.{name}").FORMAT
    return found
