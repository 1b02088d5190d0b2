"""Samples held out of training for the validation loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.media.images import (
    ImageError,
    read_caption,
)

if TYPE_CHECKING:
    pass


# Cut photos of a folder that fits are decoded once a process; a larger one is read anew each time.
KEEP_BYTES = 256 * 2**20


def check_split(validation: int, count: int, what: str) -> None:
    """Raises ValueError if holding out `validation` of `count` samples leaves none to train on."""
    if validation >= count:
        raise ValueError(
            f"validation={validation} leaves none to train on of {count} {what}; "
            f"hold out at most {count - 1}"
        )


def is_told(path: Path, caption: Callable[[Path], str | None] = read_caption) -> bool:
    """Whether there is a caption for a file, usable or not; caption: how it is read."""
    try:
        return caption(path) is not None
    except ImageError:
        return True  # there is one, and `open` says what is wrong with it
