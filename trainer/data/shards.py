"""Data source `shards`: tars in webdataset layout, read by index and checked by a manifest.

    000012.jpg  000012.txt  000012.json  000012.mask.png     one sample: consecutive, of one stem

A reader of streams passes over a cut shard or a flipped bit in silence. So the first use reads
each tar once, decodes every image, and keeps where each member lies and its CRC-32; a sample is
then one seek and one read of the exact bytes, and whatever has changed since is an error.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, field_validator

from trainer.data import Dataset, Needs, Sample, Source
from trainer.data.folder import check_split
from trainer.data.images import ImageError, decode_image
from trainer.data.manifest import (
    CAPTION,
    IMAGES,
    MANIFEST,
    MASK,
    MAX_MEMBER,
    METADATA,
    Entry,
    Manifest,
    Shard,
    caption_of,
    index,
    mask_of,
    metadata_of,
    save,
)

if TYPE_CHECKING:
    from torch import Tensor


class Shards(Source):
    """shards: a folder of .tar files, or one; validation: the last so many samples are held out;
    on_bad: what to do with samples that are incomplete or cannot be decoded; ignore: extensions
    of members to pass over, as in [cls, npy]."""

    shards: Path
    validation: int = Field(default=0, ge=0)
    on_bad: Literal["raise", "skip"] = "raise"
    ignore: tuple[str, ...] = ()

    @field_validator("shards", mode="before")
    @classmethod
    def _is_local(cls, value: Any) -> Any:
        if re.match(r"pipe:|file:|[a-z][a-z0-9+.-]+:/", str(value), re.IGNORECASE):
            raise ValueError(
                "commands and remote addresses are not read; stream the shards to a local disk "
                "first and give the folder"
            )
        return value

    @field_validator("shards")
    @classmethod
    def _holds_tars(cls, shards: Path) -> Path:
        shards = shards.expanduser()
        tars_of(shards)
        return shards

    @field_validator("ignore")
    @classmethod
    def _without_dots(cls, ignore: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(extension.lower().lstrip(".") for extension in ignore)

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        """Finds or makes the manifest and checks every shard against it, size and SHA-256.

        Raises:
            ValueError: a shard that is cut, changed, missing, or holds what it must not.
            ImageError: samples that cannot be used, all in one message.
        """
        found = manifest(self.shards, needs.cache, self.ignore)
        bad = [f"{shard.name}: {reason}" for shard in found for reason in shard.bad]
        rows = [(shard.name, sample) for shard in found for sample in shard.samples]
        if bad and (self.on_bad == "raise" or not rows):
            more = f"\n... and {len(bad) - 20} more" if len(bad) > 20 else ""
            raise ImageError(
                f"{self.shards}: {len(bad)} of {len(bad) + len(rows)} samples cannot be used, "
                "data.on_bad=skip leaves them out:\n" + "\n".join(bad[:20]) + more
            )
        check_split(self.validation, len(rows), f"samples in {self.shards}")
        folder = self.shards if self.shards.is_dir() else self.shards.parent
        cut = len(rows) - self.validation
        digests = [shard.sha256 for shard in found]
        train = Tars(folder, rows[:cut], digests, needs.resolution, bad)
        if not self.validation:
            return train, None
        return train, Tars(folder, rows[cut:], digests, needs.resolution, ())


class Tars:
    """Random access to the samples of shards."""

    shares: Sequence[float] = (1.0,)
    weights: Sequence[float] = (1.0,)
    fixed = True

    def __init__(
        self,
        folder: Path,
        rows: Sequence[tuple[str, Entry]],
        digests: Sequence[str],
        side: int,
        skipped: Sequence[str],
    ) -> None:
        self.folder, self.rows, self.digests, self.side = folder, rows, digests, side
        self.skipped = skipped
        self.groups: Sequence[range] = (range(len(rows)),)

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image and caption; raises ValueError if their bytes changed since `open`."""
        return Sample(self.image(index), self.caption(index, rng), self.rows[index][1].key)

    def image(self, index: int) -> Tensor:
        """Float32 (3, side, side) in [-1, 1]; raises ValueError as `sample`."""
        from trainer.data.images import resize_cover, to_tensor

        name, entry = self.rows[index]
        extension = next(iter(entry.members.keys() & IMAGES))
        image = decode_image(self._read(index, extension), f"{name}: {entry.key}.{extension}")
        return to_tensor(resize_cover(image, self.side))

    def caption(self, index: int, rng: np.random.Generator) -> str:
        members = self.rows[index][1].members
        told = CAPTION if CAPTION in members else METADATA
        return caption_of({told: self._read(index, told)}, self.rows[index][1].key)

    def metadata(self, index: int) -> dict[str, Any]:
        """The sample's .json, empty without one."""
        if METADATA not in self.rows[index][1].members:
            return {}
        return metadata_of(self._read(index, METADATA), self.rows[index][1].key)

    def mask(self, index: int) -> np.ndarray | None:
        """Owner of each pixel, uint8 (height, width): 0 background, k the k-th object from back to
        front; at the size of the image as stored. None without a mask."""
        entry = self.rows[index][1]
        if MASK not in entry.members:
            return None
        return mask_of(self._read(index, MASK), entry.key, (entry.width, entry.height))

    def fingerprint(self) -> str:
        """SHA-256 over the checksums of the shards, the samples taken, and what is done to them."""
        keys = [entry.key for _, entry in self.rows]
        return hashlib.sha256(
            repr(("shards-1", self.side, self.digests, keys)).encode()
        ).hexdigest()

    def _read(self, index: int, extension: str) -> bytes:
        name, entry = self.rows[index]
        part = entry.members[extension]
        # Opened for each read: a handle would be shared by forked workers, position and all.
        with (self.folder / name).open("rb") as file:
            file.seek(part.offset)
            data = file.read(min(part.size, MAX_MEMBER))
        if len(data) != part.size or zlib.crc32(data) != part.crc32:
            raise ValueError(
                f"{self.folder / name}: the bytes of {entry.key}.{extension} are not those that "
                "were indexed; the shard is damaged or was replaced, copy it again"
            )
        return data


def tars_of(shards: Path) -> list[Path]:
    """The .tar files of a folder by name, or the one given.

    Raises:
        ValueError: missing, not a .tar, or a folder without any.
    """
    expected = "expected a folder of .tar files in webdataset layout, or one .tar"
    if not shards.exists():
        raise ValueError(f"{shards}: no such file or folder; {expected}")
    if shards.is_dir():
        paths = sorted(path for path in shards.glob("*.tar") if not path.name.startswith("."))
        if not paths:
            raise ValueError(f"{shards}: no .tar in this folder; {expected}, not compressed")
        return paths
    if shards.suffix != ".tar":
        raise ValueError(f"{shards}: not a .tar; {expected}, not compressed")
    return [shards]


def manifest(shards: Path, cache: Path, ignore: Collection[str] = ()) -> list[Shard]:
    """What the shards hold, by the manifest beside them or in `cache`; made and kept if missing.

    Raises:
        ValueError: a shard differs from the manifest; anything `index` refuses.
    """
    paths = tars_of(shards)
    whole = shards.is_dir()
    folder = shards if whole else shards.parent
    name = hashlib.sha256(str(shards.resolve()).encode()).hexdigest()[:24]
    places = [folder / (MANIFEST if whole else f"{shards.stem}.{MANIFEST}")]
    places.append(cache / "shards" / f"{name}.json")
    for place in dict.fromkeys([folder / MANIFEST, *places]):
        if not place.is_file():
            continue
        listed = {shard.name: shard for shard in _load(place).shards}
        if whole:
            _check_names({path.name for path in paths}, listed.keys(), place)
        if whole or shards.name in listed:
            return [_unchanged(path, listed[path.name], place) for path in paths]
    made = index(paths, ignore)
    _keep(Manifest(shards=tuple(made)), places)
    return made


def _load(place: Path) -> Manifest:
    try:
        return Manifest.model_validate_json(place.read_bytes())
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise ValueError(
            f"{place}: not a manifest of shards ({why}); move it away, and it is made anew"
        ) from error


def _check_names(there: Collection[str], listed: Collection[str], place: Path) -> None:
    missing, new = sorted(set(listed) - set(there)), sorted(set(there) - set(listed))
    if missing or new:
        said = [f"{name} is missing" for name in missing] + [f"{name} is not in it" for name in new]
        raise ValueError(f"{place}: {', '.join(said)}; {_mend(place)}")


def _unchanged(path: Path, shard: Shard, place: Path) -> Shard:
    size = path.stat().st_size
    if size != shard.size:
        held = len(shard.samples) + len(shard.bad)
        raise ValueError(
            f"{path}: {size} bytes, {place.name} lists {shard.size} with {held} samples; "
            + _mend(place)
        )
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise ValueError(f"{path}: not the bytes that {place.name} lists; {_mend(place)}")
    return shard


def _mend(place: Path) -> str:
    return f"copy the shards again, or if the change is meant remove {place}, and it is made anew"


def _keep(found: Manifest, places: Sequence[Path]) -> None:
    for place in places[:-1]:
        try:
            return save(found, place)
        except OSError:
            continue  # a data folder that only others may write
    save(found, places[-1])
