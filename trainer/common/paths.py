"""Where recipes and shipped weights are: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).parent.parent


def _shipped(inside: str, beside: str) -> Path:
    folder = PACKAGE / inside
    return folder if folder.is_dir() else PACKAGE.parent / beside


RECIPES = _shipped("_recipes", "recipes")
BACKBONES = RECIPES / "backbone"
DATA = _shipped("_data", "data")


def shipped(name: str | Path) -> Path:
    """The path itself; where there is none, the folder of what ships under this name."""
    path = Path(name).expanduser()
    own = DATA / path.name
    return own if path == Path(path.name) and not path.exists() and own.is_dir() else path


def bare_name(name: str | Path) -> str:
    """A name as it is; of a file or folder its own name, without the path that leads to it."""
    return Path(name).name or str(name)


def slug(text: str) -> str:
    """Text as a file name, of at most 60 letters."""
    words = "".join(letter if letter.isalnum() else " " for letter in text).split()
    return "-".join(words)[:60] or "sample"


def cache_folder() -> Path:
    """Where latents and prior images are kept between runs; `TRAINER_CACHE` moves it."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "attention-trainer"
    return Path(os.environ.get("TRAINER_CACHE", default)).expanduser()
