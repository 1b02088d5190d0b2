"""The cache of VAE posteriors: every image is encoded once and kept in one fp16 array that several
runs and ranks can map.

While it is made, each batch is a file of its own, so that an interruption loses one batch at most.
"""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from trainer.common.atomic import written_atomically
from trainer.common.long_work import long_work
from trainer.data.source import Dataset

MARK = b"CRC:"  # before the checksum, behind the array
HASHED = 2**26  # bytes that the checksum takes at once

Encode = Callable[[Tensor], Tensor]


def moments(
    dataset: Dataset,
    encode: Encode,
    encoder: str,
    folder: Path,
    batch_size: int = 32,
) -> np.ndarray:
    """Posterior moments (n, 2c, h, w) float16 of a dataset whose images never change, read from the
    cache or made; `rows` tells which are those of a sample. A damaged array is made anew.

    Args:
        encode: pixels (b, 3, H, W) to moments (b, 2c, h, w).
        encoder: identity of the encoder's weights; with the dataset's fingerprint it keys the file.
        folder: the cache. batch_size: images that are read and encoded at once.
    """
    assert dataset.fixed, "only images that never change can be cached"
    key = hashlib.sha256(f"{dataset.fingerprint()}|{encoder}|fp16".encode()).hexdigest()[:24]
    path = folder / "latents" / f"{key}.npy"
    found = read_array(path)
    if found is not None:
        return found
    try:
        _make(path, list(_batches(dataset, batch_size)), encode, dataset=dataset)
    except FileNotFoundError:  # another process was faster, and has removed the parts
        if not path.is_file():
            raise
    found = read_array(path)
    assert found is not None, f"{path} does not hold what was just written"
    return found


def read_array(path: Path) -> np.ndarray | None:
    """A mapped array, after its checksum was compared; None where it is missing or damaged. One of
    an earlier version has no checksum."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        with path.open("rb") as file:
            file.seek(array.offset + array.nbytes)  # type: ignore[attr-defined]
            behind = file.read(len(MARK) + 5)
    except (OSError, ValueError, EOFError):  # what numpy raises for a file that is cut off
        return None
    sound = not behind or behind == MARK + checksum(array).to_bytes(4, "big")
    return array if sound else None


def checksum(array: np.ndarray) -> int:
    """CRC-32 of the values, a part at a time."""
    found, flat = 0, array.reshape(-1).view(np.uint8).data
    for start in range(0, len(flat), HASHED):
        found = zlib.crc32(flat[start : start + HASHED], found)
    return found


def rows(dataset: Dataset, index: int) -> slice:
    """Where the moments of sample `index` lie: one row a frame, sample after sample."""
    start = 0
    for group, frames in zip(dataset.groups, dataset.frames, strict=True):
        if index in group:
            start += (index - group.start) * frames
            return slice(start, start + frames)
        start += len(group) * frames
    raise IndexError(f"sample {index} is in no group")


def frames_of(image: Tensor) -> Tensor:
    """A clip (frames, 3, H, W) as it is; an image (3, H, W) as a clip of one frame."""
    return image if image.ndim == 4 else image[None]


def _batches(dataset: Dataset, batch_size: int) -> Iterator[range]:
    """The samples in order, as many at a time as have `batch_size` frames, or one that has more."""
    first = taken = 0
    for index in range(len(dataset)):
        own = rows(dataset, index)
        frames = own.stop - own.start
        if taken and taken + frames > batch_size:
            yield range(first, index)
            first, taken = index, 0
        taken += frames
    yield range(first, len(dataset))


@dataclass(frozen=True)
class Part:
    """The file of one batch. first, last: the rows of the whole array it holds, last excluded."""

    file: Path
    samples: range
    first: int
    last: int

    def read(self) -> np.ndarray | None:
        """Its moments; None where the file is missing or damaged."""
        try:
            with np.load(self.file, allow_pickle=False) as stored:  # a zip file has checksums
                found: np.ndarray = stored["moments"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
            return None
        return found if len(found) == self.last - self.first else None


def _make(path: Path, batches: Sequence[range], encode: Encode, *, dataset: Dataset) -> None:
    """Encodes the batches that are not there yet, and puts all of them together."""
    folder = path.with_suffix(".parts")
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_part(folder, dataset, batch) for batch in batches]
    missing = [part for part in parts if part.read() is None]
    total = parts[-1].last
    absent = sum(part.last - part.first for part in missing)
    with long_work("latents", total, total - absent) as advance:
        for part in missing:
            pixels = torch.cat([frames_of(dataset.image(index)) for index in part.samples])
            with written_atomically(part.file) as beside:
                np.savez(beside, moments=encode(pixels).half().cpu().numpy())
            advance(part.last - part.first)
    with written_atomically(path) as beside:
        _join(beside, parts)
    shutil.rmtree(folder, ignore_errors=True)


def _part(folder: Path, dataset: Dataset, batch: range) -> Part:
    first, last = rows(dataset, batch[0]).start, rows(dataset, batch[-1]).stop
    return Part(folder / f"{first:08d}.npz", samples=batch, first=first, last=last)


def _join(path: Path, parts: Sequence[Part]) -> None:
    """Writes the array of all parts, and its checksum behind it."""
    array = None
    for part in parts:
        found = part.read()
        if found is None:
            raise FileNotFoundError(f"{part.file}: not there any more, or damaged; start again")
        if array is None:
            shape = (parts[-1].last, *found.shape[1:])
            array = np.lib.format.open_memmap(path, "w+", np.float16, shape=shape)
        array[part.first : part.last] = found
    assert array is not None
    array.flush()
    with path.open("ab") as file:
        file.write(MARK + checksum(array).to_bytes(4, "big"))
