"""How a name in a recipe becomes a file of this package, and the class in it."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any

from trainer.common.paths import PACKAGE

LEVELS = ("weight", "function", "feature", "map", "application")


@cache  # a recipe is checked by many questions, and each asks for the files
def method_files() -> tuple[Path, ...]:
    """The files of `trainer/methods/<level>/`; a file's name is its method's."""
    files = [path for level in LEVELS for path in (PACKAGE / "methods" / level).glob("*.py")]
    named = (path for path in files if not path.stem.startswith("_"))
    return tuple(sorted(named, key=lambda path: path.stem))


@cache
def source_files() -> tuple[Path, ...]:
    """The files of `trainer/data/sources/` that define a data source; found without importing."""
    marked = [
        path
        for path in (PACKAGE / "data" / "sources").glob("*.py")
        if "(Source):" in path.read_text(encoding="utf-8")
    ]
    return tuple(sorted(marked))


def only_class(module: str, base: type) -> Any:
    """The one subclass of `base` that a file defines: how a name becomes a method or a source."""
    own = vars(importlib.import_module(module)).values()
    found = [item for item in own if isinstance(item, type) and issubclass(item, base)]
    found = [item for item in found if item.__module__ == module]
    assert len(found) == 1, f"{module} must define exactly one {base.__name__}"
    return found[0]
