"""What a model has generated, kept between runs and through interruptions: one file for each
picture or step, written completely or not at all, and verified when it is read: its bytes by their
checksum, and its place, which it names itself, by its folder and number."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from trainer.common.atomic import written_atomically
from trainer.common.long_work import LongWork, long_work
from trainer.media.made_by import png_bytes

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

PLACE = "place"  # the entry of a PNG that says whose it is


def kept_pictures(
    folder: Path,
    count: int,
    make: Callable[[range], Sequence[Image.Image]],
    *,
    at_once: int,
    what: str,
    work: LongWork | None = None,
) -> list[Image.Image]:
    """Pictures 0 to count - 1, read from a folder of PNGs; those that are missing or damaged are
    made and stored there.

    A batch is always made of the same numbers, so that what is made after an interruption is equal
    to what would have been made without one.

    make: the pictures with the numbers of a range, of at most `at_once` numbers. what: the pictures
    for the display of the progress, as in "class images". work: a display of more than these, which
    is told of them in place of one of their own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = [read_kept(_path(folder, number)) for number in range(count)]
    missing = [number for number, picture in enumerate(found) if picture is None]
    if work is not None:
        work.found(count - len(missing))
    if missing:
        own = long_work(what, count, count - len(missing)) if work is None else nullcontext(work)
        with own as advance:
            for first in range(0, count, at_once):
                batch = range(first, min(first + at_once, count))
                absent = [number for number in batch if found[number] is None]
                _fill(folder, batch, found, make=make)
                advance(len(absent))
    return [picture for picture in found if picture is not None]


def read_kept(path: Path) -> Image.Image | None:
    """A picture of `kept_pictures`; None where there is no file, or one with a wrong checksum,
    without its end, or written for another place."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()  # the checksum of every part, which reading the pixels passes over
        with Image.open(path, formats=["PNG"]) as image:
            pixels = image.convert("RGB")
            return pixels if image.info.get(PLACE) == place_of(path) else None
    except (OSError, SyntaxError, ValueError):  # what PIL raises for a damaged file
        return None


class KeptSteps:
    """Tensors of the steps of one calculation, a file each: `kept[step] = tensor` stores one, and
    `kept.get(step)` reads it, or gives None where it is missing or damaged.

    stored: called after each that is stored, with 1.
    """

    def __init__(self, folder: Path, stored: Callable[[int], None] = lambda count: None) -> None:
        self.folder, self.stored = folder, stored
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, step: int) -> Tensor | None:
        import torch

        try:
            with np.load(
                self._file(step), allow_pickle=False
            ) as stored:  # zip files have checksums
                here = str(stored["place"]) == place_of(self._file(step))
                return torch.from_numpy(stored["tensor"]) if here else None
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
            return None

    def __setitem__(self, step: int, tensor: Tensor) -> None:
        with written_atomically(self._file(step)) as part:
            place = place_of(self._file(step))
            np.savez(part, tensor=tensor.detach().cpu().numpy(), place=place)
        self.stored(1)

    def __len__(self) -> int:
        return len(list(self.folder.glob("[0-9]*.npz")))

    def _file(self, step: int) -> Path:
        return self.folder / f"{step:05d}.npz"


def _fill(
    folder: Path,
    batch: range,
    found: list[Image.Image | None],
    *,
    make: Callable[[range], Sequence[Image.Image]],
) -> None:
    """Makes those pictures of a batch that are missing, unless another process has just done so."""
    absent = [number for number in batch if found[number] is None]
    for number in absent:
        found[number] = read_kept(_path(folder, number))
    absent = [number for number in absent if found[number] is None]
    if not absent:
        return
    made = make(batch)
    for number in absent:
        picture = made[number - batch.start]
        with written_atomically(_path(folder, number)) as part:
            own = {PLACE: place_of(_path(folder, number))}
            part.write_bytes(png_bytes(picture, own))
        found[number] = picture


def place_of(path: Path) -> str:
    """Folder and number. The folder's name is a digest of all else that its files depend on."""
    return f"{path.parent.name}/{path.stem}"


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"
