"""The cache of VAE posteriors: every image is encoded once and kept in one fp16 array that several
runs and ranks can map.

Behind the array are its key, a CRC-32 of every row and one of the whole file, as `tars/` has them
of shards: an array that is cut, altered, of another version, or in another one's place is made
anew, and a row that changes while a run reads it ends the run. While the array is made, each batch
is a file of its own, so that an interruption loses one batch at most.
"""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from trainer.common.atomic import written_atomically
from trainer.common.long_work import long_work
from trainer.data.source import Dataset

MARK = b"CRC2"  # at the end of the file, before the checksum of all that is before it
HASHED = 2**26  # bytes that a checksum takes at once

Encode = Callable[[Tensor], Tensor]


class Latents:
    """Posterior moments (n, 2c, h, w) float16 of a data set in a verified file; `latents[rows]` are
    some of them, compared with their checksums at every read. A data worker maps the file itself.
    shrinks: as of `moments`.
    """

    def __init__(self, path: Path, key: str, shrinks: int = 1) -> None:
        """Raises ValueError or OSError where the file is not what was written under `key`."""
        self.path, self.key, self.shrinks = path, key, shrinks
        self._open()

    def _open(self) -> None:
        self.array: np.ndarray = np.load(self.path, mmap_mode="r", allow_pickle=False)
        start: int = self.array.offset
        with self.path.open("rb") as file:
            before = file.read(start)
            file.seek(start + self.array.nbytes)
            behind = file.read()
        self.checks = np.frombuffer(behind[len(self.key) : -8], "<u4")
        if behind != _behind(before, self.array, key=self.key, checks=self.checks):
            raise ValueError(f"{self.path}: not what was written there")

    def __len__(self) -> int:
        return len(self.array)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def __getitem__(self, rows: slice | int) -> np.ndarray:
        """Raises ValueError where a row is not the one that was encoded."""
        if isinstance(rows, int):
            one: np.ndarray = self[rows : rows + 1][0]
            return one
        found = np.ascontiguousarray(self.array[rows])
        for number, row in zip(range(*rows.indices(len(self))), found, strict=True):
            if zlib.crc32(row.data) != self.checks[number]:
                raise ValueError(
                    f"{self.path}: row {number} has changed since it was verified; start again, "
                    "and the latents are made anew"
                )
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "key": self.key, "shrinks": self.shrinks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def moments(
    dataset: Dataset,
    encode: Encode,
    encoder: str,
    folder: Path,
    batch_size: int = 32,
    shrinks: int = 1,
) -> Latents:
    """The moments of a dataset whose images never change, read from the cache or made; `rows` tells
    which are those of a sample. A file that is not sound is made anew.

    Args:
        encode: pixels (b, 3, H, W) to moments (b, 2c, h, w).
        encoder: identity of the encoder's weights; with the dataset's fingerprint it keys the file.
        folder: the cache. batch_size: images that are read and encoded at once.
        shrinks: frames that the encoder makes one of, after a clip's first; if above 1, it gets
            one clip or image in each call.

    Raises:
        ValueError: the moments of a sample are not finite in fp16; the message names it.
    """
    assert dataset.fixed, "only images that never change can be cached"
    key = hashlib.sha256(f"{dataset.fingerprint()}|{encoder}|fp16".encode()).hexdigest()[:24]
    path = folder / "latents" / f"{key}.npy"
    count = rows(dataset, len(dataset) - 1, shrinks).stop
    found = read_latents(path, key, count, shrinks=shrinks)
    if found is not None:
        return found
    try:
        parts = [
            _part(path, dataset, batch, shrinks=shrinks) for batch in _batches(dataset, batch_size)
        ]
        _make(path, parts, encode, dataset=dataset)
    except FileNotFoundError:  # another process was faster, and has removed the parts
        if not path.is_file():
            raise
    found = read_latents(path, key, count, shrinks=shrinks)
    assert found is not None, f"{path} does not hold what was just written"
    return found


def read_latents(path: Path, key: str, count: int, *, shrinks: int = 1) -> Latents | None:
    """A verified file of `count` rows; None where it is missing, damaged, of an earlier version, or
    another data set's. shrinks: as of `moments`."""
    try:
        found = Latents(path, key, shrinks)
    except (OSError, ValueError, EOFError):  # what numpy raises for a file that is cut off
        return None
    sound = found.array.dtype == np.float16 and found.array.ndim == 4 and len(found) == count
    return found if sound else None


def as_stored(moments: Tensor) -> Tensor:
    """Moments as they come back from the cache, rounded to fp16 and in fp32: a run trains on the
    same latents with `run.cache_latents` and without."""
    return moments.half().float()


def checksum(array: np.ndarray, found: int = 0) -> int:
    """CRC-32 of the values after those whose checksum is `found`, a part at a time."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    for start in range(0, len(flat), HASHED):
        found = zlib.crc32(flat[start : start + HASHED], found)
    return found


def _behind(before: bytes, array: np.ndarray, *, key: str, checks: np.ndarray) -> bytes:
    """What stands behind the array: its key, the checksum of each row, and that of the header
    `before` it, the array and these."""
    own = key.encode() + checks.astype("<u4").tobytes()
    whole = zlib.crc32(own, checksum(array, zlib.crc32(before)))
    return own + MARK + whole.to_bytes(4, "big")


def rows(dataset: Dataset, index: int, shrinks: int = 1) -> slice:
    """Where the moments of sample `index` lie, sample after sample: one row a frame, or fewer where
    the VAE `shrinks` clips."""
    start = 0
    for group, frames in zip(dataset.groups, dataset.frames, strict=True):
        own = (frames - 1) // shrinks + 1
        if index in group:
            start += (index - group.start) * own
            return slice(start, start + own)
        start += len(group) * own
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
    """The file of one batch. first, last: the rows of the whole array it holds, last excluded; key:
    of the array; shrinks: as of `moments`."""

    file: Path
    samples: range
    first: int
    last: int
    key: str
    shrinks: int = 1

    def pixels(self, dataset: Dataset) -> Iterator[Tensor]:
        """What the encoder gets, one after another."""
        each = (frames_of(dataset.image(index)) for index in self.samples)
        if self.shrinks > 1:
            yield from each
        else:
            yield torch.cat(list(each))

    def write(self, moments: np.ndarray) -> None:
        with written_atomically(self.file) as beside:
            np.savez(beside, moments=moments, place=self._place)

    def read(self) -> np.ndarray | None:
        """Its moments; None where the file is missing, damaged, or of another place."""
        try:
            with np.load(self.file, allow_pickle=False) as stored:  # a zip file has checksums
                found: np.ndarray = stored["moments"]
                place = str(stored["place"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
            return None
        sound = place == self._place and found.dtype == np.float16 and found.ndim == 4
        return found if sound and len(found) == self.last - self.first else None

    @property
    def _place(self) -> str:
        return f"{self.key} {self.first} {self.last}"


def _make(path: Path, parts: Sequence[Part], encode: Encode, *, dataset: Dataset) -> None:
    """Encodes the batches that are not there yet, and puts all of them together."""
    folder = path.with_suffix(".parts")
    folder.mkdir(parents=True, exist_ok=True)
    missing = [part for part in parts if part.read() is None]
    total = parts[-1].last
    absent = sum(part.last - part.first for part in missing)
    with long_work("latents", total, total - absent) as advance:
        for part in missing:
            moments = torch.cat([encode(pixels) for pixels in part.pixels(dataset)])
            made = moments.half().cpu().numpy()
            _check_finite(made, part, dataset)
            part.write(made)
            advance(part.last - part.first)
    with written_atomically(path) as beside:
        _join(beside, parts)
    shutil.rmtree(folder, ignore_errors=True)


def _check_finite(made: np.ndarray, part: Part, dataset: Dataset) -> None:
    for index in part.samples:
        own = rows(dataset, index, part.shrinks)
        if not np.isfinite(made[own.start - part.first : own.stop - part.first]).all():
            raise ValueError(
                f"the VAE makes values of {dataset.key(index)} that are not finite in fp16; take "
                "that sample out of the data"
            )


def _part(path: Path, dataset: Dataset, batch: range, *, shrinks: int) -> Part:
    first, last = (rows(dataset, index, shrinks) for index in (batch[0], batch[-1]))
    return Part(
        path.with_suffix(".parts") / f"{first.start:08d}.npz",
        samples=batch,
        first=first.start,
        last=last.stop,
        key=path.stem,
        shrinks=shrinks,
    )


def _join(path: Path, parts: Sequence[Part]) -> None:
    """Writes the array of all parts, and what stands behind it."""
    array: Any = None
    for part in parts:
        found = part.read()
        if found is None or (array is not None and found.shape[1:] != array.shape[1:]):
            raise FileNotFoundError(f"{part.file}: not there any more, or damaged; start again")
        if array is None:
            shape = (parts[-1].last, *found.shape[1:])
            array = np.lib.format.open_memmap(path, "w+", np.float16, shape=shape)
        array[part.first : part.last] = found
    assert array is not None
    array.flush()
    checks = np.array([zlib.crc32(row.data) for row in array], "<u4")
    with path.open("rb") as file:
        before = file.read(array.offset)
    with path.open("ab") as file:
        file.write(_behind(before, array, key=parts[0].key, checks=checks))
