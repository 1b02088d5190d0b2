"""Samples read from tar shards by offset."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from trainer.data.buckets import arrange, check_step
from trainer.data.crops import Crop, central
from trainer.data.identity import digest_of
from trainer.data.loss_mask import checked_cells
from trainer.data.source import Needs, Sample
from trainer.data.source_checks import check_split
from trainer.data.tars.manifest import (
    CAPTION,
    IMAGES,
    MASK,
    MAX_MEMBER,
    METADATA,
    VIDEO,
    Entry,
    Shard,
    caption_of,
    loss_weights_of,
    mask_of,
    metadata_of,
)
from trainer.media.images import ImageError, cover, decode_image

if TYPE_CHECKING:
    from torch import Tensor


class Read(Protocol):
    """Reads `size` bytes from `offset` on, of the shard `name` in a folder or at an address."""

    def __call__(self, folder: Path | str, name: str, *, offset: int, size: int) -> bytes: ...


def check_usable(found: Sequence[Shard], place: object, on_bad: str) -> list[str]:
    """A sentence for each sample that cannot be used. place: names the shards in messages.

    Raises:
        ImageError: there are such samples, and `on_bad` is "raise" or no other samples exist.
        ValueError: the shards contain videos.
    """
    bad = [f"{shard.name}: {reason}" for shard in found for reason in shard.bad]
    rows = [entry for shard in found for entry in shard.samples]
    if bad and (on_bad == "raise" or not rows):
        more = f"\n... and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise ImageError(
            f"{place}: {len(bad)} of {len(bad) + len(rows)} samples cannot be used, "
            "data.on_bad=skip leaves them out:\n" + "\n".join(bad[:20]) + more
        )
    if any(entry.video for entry in rows):
        raise ValueError(
            f"{place} contains videos; read them by data.source=video data.video={place}"
        )
    return bad


def read_local(folder: Path | str, name: str, *, offset: int, size: int) -> bytes:
    """Bytes of a shard in a local folder."""
    # opened for each read: forked workers would share a handle and its position
    with (Path(folder) / name).open("rb") as file:
        file.seek(offset)
        return file.read(size)


@dataclass(frozen=True)
class Opening:
    """How shards are opened: the folder or address they are read from by `read`; a sentence for
    each skipped sample; how many samples, the last ones, are held out; step: see `buckets.py`."""

    folder: Path | str
    skipped: Sequence[str]
    validation: int
    step: int
    read: Read = read_local


def split(found: Sequence[Shard], needs: Needs, opening: Opening) -> tuple[Tars, Tars | None]:
    """The samples of shards to train on, and the held-out ones, if any."""
    folder, validation, step = opening.folder, opening.validation, opening.step
    check_step(step, needs.divisor)
    rows = [(shard.name, entry) for shard in found for entry in shard.samples]
    check_split(validation, len(rows), f"samples in {folder}")
    cut = len(rows) - validation

    def tars(part: Sequence[tuple[str, Entry]], skipped: Sequence[str]) -> Tars:
        return Tars(
            folder,
            part,
            digests={shard.name: shard.sha256 for shard in found},
            side=needs.resolution,
            skipped=skipped,
            divisor=needs.divisor,
            step=step,
            read=opening.read,
        )

    return tars(rows[:cut], opening.skipped), tars(rows[cut:], ()) if validation else None


class Tars:
    """Random access to the samples of shards, given as (name of the shard, entry). digests: of all
    shards by name; divisor: pixels per latent along an edge; step: see `buckets.py`."""

    rates: Sequence[float] = ()

    def __init__(
        self,
        folder: Path | str,
        rows: Sequence[tuple[str, Entry]],
        *,
        digests: Mapping[str, str],
        side: int,
        divisor: int,
        skipped: Sequence[str] = (),
        step: int = 0,
        read: Read = read_local,
    ) -> None:
        self.folder, self.digests, self.side, self.step = folder, dict(digests), side, step
        self.divisor, self.skipped, self.read = divisor, skipped, read
        shapes = [(entry.width, entry.height) for _, entry in rows]
        order, groups, sizes = arrange(shapes, side, step)
        self.rows = [rows[i] for i in order]
        self.groups: Sequence[range] = tuple(groups)
        self.sizes = sizes
        self.shares: Sequence[float] = tuple(len(group) / len(rows) for group in groups)
        self.weights: Sequence[float] = (1.0,) * len(groups)
        self.frames: Sequence[int] = (1,) * len(groups)
        self.fixed = len(sizes) == 1

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image and caption; raises ValueError if their bytes changed since they were indexed."""
        image, caption, mask = self.image(index), self.caption(index, rng), self.loss_mask(index)
        return Sample(image=image, caption=caption, key=self.key(index), mask=mask)

    def key(self, index: int) -> str:
        return self.rows[index][1].key

    def image(self, index: int) -> Tensor:
        """Float32 (3, H, W) in [-1, 1]; raises ValueError as `sample`."""
        from trainer.media.images import to_tensor

        name, entry = self.rows[index]
        extension = next(iter(entry.members.keys() & IMAGES))
        image = decode_image(self._read(index, extension), f"{name}: {entry.key}.{extension}")
        return to_tensor(cover(image, self._size(index)))

    def crop(self, index: int) -> Crop:
        """See `Cropped`."""
        entry = self.rows[index][1]
        return central((entry.width, entry.height), self._size(index))

    def loss_mask(self, index: int) -> Tensor | None:
        """The weights of a grey mask, see `Masked`; ImageError where the cut leaves none of it."""
        name, entry = self.rows[index]
        if not entry.weighs:
            return None
        size = (entry.width, entry.height)
        weights = loss_weights_of(self._read(index, MASK), entry.key, size)
        assert weights is not None  # its bytes are those that were indexed
        owner = f"{name}: {entry.key}"
        return checked_cells(weights, self._size(index), divisor=self.divisor, name=owner)

    def video(self, index: int) -> bytes:
        """The bytes of the sample's .mp4; raises ValueError as `sample`."""
        return self._read(index, VIDEO)

    def caption(self, index: int, rng: np.random.Generator) -> str:
        members = self.rows[index][1].members
        extension = CAPTION if CAPTION in members else METADATA
        return caption_of({extension: self._read(index, extension)}, self.rows[index][1].key)

    def metadata(self, index: int) -> dict[str, Any]:
        """The object in the sample's .json, empty without one."""
        if METADATA not in self.rows[index][1].members:
            return {}
        return metadata_of(self._read(index, METADATA), self.rows[index][1].key)

    def mask(self, index: int) -> np.ndarray | None:
        """The object at each pixel, uint8 (height, width) in the size of the stored image: 0 is the
        background, k the k-th object from back to front. None without a mask."""
        entry = self.rows[index][1]
        if MASK not in entry.members:
            return None
        return mask_of(self._read(index, MASK), entry.key, (entry.width, entry.height))

    def fingerprint(self) -> str:
        """SHA-256 over the checksums of the shards, the keys of the samples, and the sizes."""
        keys = [entry.key for _, entry in self.rows]
        cut = (self.sizes,) if self.step else ()
        done = ("shards-1", self.side, list(self.digests.values()), keys, *cut)
        return hashlib.sha256(repr(done).encode()).hexdigest()

    def identity(self) -> dict[str, str]:
        """The checksum of every shard, which holds pictures and captions, and the samples' keys."""
        keys = sorted(f"{name} {entry.key}" for name, entry in self.rows)
        return {**self.digests, "the choice of samples": digest_of(*keys)}

    def _size(self, index: int) -> tuple[int, int]:
        sizes = zip(self.groups, self.sizes, strict=True)
        return next(size for group, size in sizes if index in group)

    def _read(self, index: int, extension: str) -> bytes:
        name, entry = self.rows[index]
        part = entry.members[extension]
        size = min(part.size, MAX_MEMBER)
        data = self.read(self.folder, name, offset=part.offset, size=size)
        if len(data) != part.size or zlib.crc32(data) != part.crc32:
            raise ValueError(
                f"{self.folder}/{name}: the bytes of {entry.key}.{extension} have changed since "
                "they were indexed; the shard is damaged or was replaced, copy it again"
            )
        return data
