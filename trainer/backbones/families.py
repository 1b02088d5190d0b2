"""The families of backbones there are, each the file beside this one that declares it."""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path

from trainer.backbones.family import Family

DECLARES = "\nFAMILY = Family("  # in the text of a family's file, and of no other


@cache  # to load one backbone asks for them some twenty times
def family_names() -> tuple[str, ...]:
    """The families there are: the files of this folder that declare one."""
    files = Path(__file__).parent.glob("*.py")
    names = (file.stem for file in files if DECLARES in file.read_text(encoding="utf-8"))
    return tuple(sorted(names))


def find_family(name: str) -> Family:
    """What the file called `name` declares.

    Raises:
        ValueError: there is no such family.
    """
    if name not in family_names():
        raise ValueError(f"no family is called {name!r}; choose from {', '.join(family_names())}")
    family: Family = importlib.import_module(f"trainer.backbones.{name}").FAMILY
    return family


def family_of(folder: Path) -> str:
    """The family that loads a pipeline folder; if none does, `sd`, whose error explains why."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return "sd"
    pipeline = index.get("_class_name") if isinstance(index, dict) else None
    found = (name for name in family_names() if pipeline in find_family(name).pipelines)
    return next(found, "sd")
