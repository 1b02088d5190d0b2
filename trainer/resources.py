"""Where the recipes and what ships trained lie, beside the package in a checkout, inside it in a
wheel; and how a file is written whole."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


def _shipped(inside: str, beside: str) -> Path:
    folder = _HERE / inside
    return folder if folder.is_dir() else _HERE.parent / beside


RECIPES = _shipped("_recipes", "recipes")
BACKBONES = RECIPES / "backbone"
DATA = _shipped("_data", "data")


def shipped(name: str | Path) -> Path:
    """The path itself; where there is none, the folder of what ships under this name."""
    path = Path(name).expanduser()
    own = DATA / path.name
    return own if path == Path(path.name) and not path.exists() and own.is_dir() else path


def cache_folder() -> Path:
    """Where latents and prior images are kept between runs; `TRAINER_CACHE` moves it."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "attention-trainer"
    return Path(os.environ.get("TRAINER_CACHE", default)).expanduser()


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another name to write a file under, which gets its own when the block ends well: it is there
    whole or not at all, and what was there before stays until then."""
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


LEVELS = ("weight", "function", "feature", "map", "application")


def methods() -> list[Path]:
    """The files of `trainer/methods/<level>/`; a file's name is its method's."""
    files = [path for level in LEVELS for path in (_HERE / "methods" / level).glob("*.py")]
    return sorted(
        (path for path in files if not path.stem.startswith("_")), key=lambda path: path.stem
    )


def sources() -> list[Path]:
    """The files of `trainer/data/` that define a data source, known by their text."""
    marked = [
        path
        for path in (_HERE / "data").glob("*.py")
        if "(Source):" in path.read_text(encoding="utf-8")
    ]
    return sorted(marked)


def the_class(module: str, base: type) -> Any:
    """The one subclass of `base` that a file defines: how a name becomes a method or a source."""
    own = vars(importlib.import_module(module)).values()
    found = [item for item in own if isinstance(item, type) and issubclass(item, base)]
    found = [item for item in found if item.__module__ == module]
    assert len(found) == 1, f"{module} must define exactly one {base.__name__}"
    return found[0]
