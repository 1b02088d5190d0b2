"""Checks that several data sources share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from trainer.media.images import ImageError
from trainer.media.read_caption import read_caption

# a process keeps decoded pictures in memory up to this size; larger data are decoded each time
KEEP_BYTES = 256 * 2**20


def check_split(validation: int, count: int, what: str) -> None:
    """Raises ValueError if no sample is left to train on after `validation` of `count` are held
    out. what: names the samples in the message."""
    if validation >= count:
        raise ValueError(
            f"validation={validation} holds out all {count} {what}, and none is left to train on; "
            f"give at most {count - 1}"
        )


def bytes_of(paths: Iterable[Path]) -> int:
    """Of files together; those that are missing count nothing, reading them reports it."""
    return sum(path.stat().st_size for path in paths if path.is_file())


def has_caption(path: Path, caption: Callable[[Path], str | None] = read_caption) -> bool:
    """Whether there is a caption for a file, readable or not; caption: reads it."""
    try:
        return caption(path) is not None
    except ImageError:
        return True  # `open` reports what is wrong with it
