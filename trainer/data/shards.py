"""Data source `shards`: tars in webdataset layout, read by index and checked by a manifest.

    000012.jpg  000012.txt  000012.json  000012.mask.png     one sample: consecutive, of one stem

A reader of streams passes over a cut shard or a flipped bit in silence. So the first use reads
each tar once, decodes every image, and keeps where each member lies and its CRC-32; a sample is
then one seek and one read of the exact bytes, and whatever has changed since is an error. The
SHA-256 of a shard is taken again where its size or its time of change is another than when it last
was, on this machine; that of all, and of every sample, by `data verify`.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, field_validator

from trainer.data import Dataset, Needs, Sample, Source
from trainer.data.buckets import arrange, check_step, cover
from trainer.data.folder import check_split
from trainer.data.images import ImageError, decode_image
from trainer.data.manifest import (
    CAPTION,
    IMAGES,
    MANIFEST,
    MASK,
    MAX_MEMBER,
    METADATA,
    VIDEO,
    Entry,
    Manifest,
    Shard,
    caption_of,
    index,
    mask_of,
    metadata_of,
    save,
)
from trainer.resources import whole

if TYPE_CHECKING:
    from torch import Tensor


# folder, shard, offset and number of bytes
Read = Callable[[Path | str, str, int, int], bytes]


class Shards(Source):
    """shards: a folder of .tar files, or one; validation: the last so many samples are held out;
    on_bad: what to do with samples that are incomplete or cannot be decoded; ignore: extensions
    of members to pass over, as in [cls, npy]; buckets: cut to aspect-ratio buckets whose sides are
    multiples of so many pixels, 0 for squares. Latents of more than one size are not cached."""

    shards: Path
    validation: int = Field(default=0, ge=0)
    on_bad: Literal["raise", "skip"] = "raise"
    ignore: tuple[str, ...] = ()
    buckets: int = Field(default=0, ge=0)

    @field_validator("shards", mode="before")
    @classmethod
    def _is_local(cls, value: Any) -> Any:
        if re.match(r"pipe:|file:|[a-z][a-z0-9+.-]+:/", str(value), re.IGNORECASE):
            raise ValueError(
                "commands and remote addresses are not read; stream the shards to a local disk "
                "first and give the folder, or read them by data.source=remote data.url=https://..."
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
        """Finds or makes the manifest and checks every shard against it.

        Raises:
            ValueError: a shard that is cut, changed, missing, or holds what it must not.
            ImageError: samples that cannot be used, all in one message.
        """
        found = manifest(self.shards, needs.cache, self.ignore)
        folder = self.shards if self.shards.is_dir() else self.shards.parent
        bad = check_usable(found, self.shards, self.on_bad)
        return split(found, folder, needs, self.validation, bad, self.buckets)


def check_usable(found: Sequence[Shard], place: object, on_bad: str) -> list[str]:
    """The samples that cannot be used, each with the reason.

    Raises:
        ImageError: there are some, and they are not to be left out, or there are no others.
        ValueError: there are videos.
    """
    bad = [f"{shard.name}: {reason}" for shard in found for reason in shard.bad]
    rows = [entry for shard in found for entry in shard.samples]
    if bad and (on_bad == "raise" or not rows):
        more = f"\n... and {len(bad) - 20} more" if len(bad) > 20 else ""
        raise ImageError(
            f"{place}: {len(bad)} of {len(bad) + len(rows)} samples cannot be used, "
            "data.on_bad=skip leaves them out:\n" + "\n".join(bad[:20]) + more
        )
    if any(entry.film for entry in rows):
        raise ValueError(
            f"{place}: there are videos in it; give data.source=video data.video={place}"
        )
    return bad


def split(
    found: Sequence[Shard],
    folder: Path | str,
    needs: Needs,
    validation: int,
    bad: Sequence[str],
    step: int,
    read: Read | None = None,
) -> tuple[Tars, Tars | None]:
    """The samples of shards to train on, and the last `validation` ones."""
    check_step(step, needs.divisor)
    rows = [(shard.name, entry) for shard in found for entry in shard.samples]
    check_split(validation, len(rows), f"samples in {folder}")
    cut = len(rows) - validation
    digests = [shard.sha256 for shard in found]
    side, how = needs.resolution, (step, read or read_local)
    train = Tars(folder, rows[:cut], digests, side, bad, *how)
    if not validation:
        return train, None
    return train, Tars(folder, rows[cut:], digests, side, (), *how)


def read_local(folder: Path | str, name: str, offset: int, size: int) -> bytes:
    # Opened for each read: a handle would be shared by forked workers, position and all.
    with (Path(folder) / name).open("rb") as file:
        file.seek(offset)
        return file.read(size)


class Tars:
    """Random access to the samples of shards, which `read` gets byte by byte. step: see
    `buckets.py`."""

    rates: Sequence[float] = ()

    def __init__(
        self,
        folder: Path | str,
        rows: Sequence[tuple[str, Entry]],
        digests: Sequence[str],
        side: int,
        skipped: Sequence[str],
        step: int = 0,
        read: Read = read_local,
    ) -> None:
        self.folder, self.digests, self.side, self.step = folder, digests, side, step
        self.skipped, self.read = skipped, read
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
        """Image and caption; raises ValueError if their bytes changed since `open`."""
        return Sample(self.image(index), self.caption(index, rng), self.rows[index][1].key)

    def image(self, index: int) -> Tensor:
        """Float32 (3, H, W) in [-1, 1]; raises ValueError as `sample`."""
        from trainer.data.images import to_tensor

        name, entry = self.rows[index]
        extension = next(iter(entry.members.keys() & IMAGES))
        image = decode_image(self._read(index, extension), f"{name}: {entry.key}.{extension}")
        size = next(
            size for group, size in zip(self.groups, self.sizes, strict=True) if index in group
        )
        return to_tensor(cover(image, size))

    def video(self, index: int) -> bytes:
        """The sample's .mp4 as it lies in the shard; raises ValueError as `sample`."""
        return self._read(index, VIDEO)

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
        cut = (self.sizes,) if self.step else ()
        done = ("shards-1", self.side, self.digests, keys, *cut)
        return hashlib.sha256(repr(done).encode()).hexdigest()

    def _read(self, index: int, extension: str) -> bytes:
        name, entry = self.rows[index]
        part = entry.members[extension]
        data = self.read(self.folder, name, part.offset, min(part.size, MAX_MEMBER))
        if len(data) != part.size or zlib.crc32(data) != part.crc32:
            raise ValueError(
                f"{self.folder}/{name}: the bytes of {entry.key}.{extension} are not those that "
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
    kept = kept_manifest(shards, cache)
    if kept is None:
        return build(shards, cache, ignore)[1]
    paths, (place, listed) = tars_of(shards), kept
    if shards.is_dir():
        _check_names({path.name for path in paths}, listed.keys(), place)
    with Hashed(shards, cache) as hashed:
        return [_unchanged(path, listed[path.name], place, hashed) for path in paths]


def kept_manifest(shards: Path, cache: Path) -> tuple[Path, dict[str, Shard]] | None:
    """Where the manifest of shards is kept, and what it lists by name; None if there is none.

    Raises:
        ValueError: a file in its place is no manifest.
    """
    folder = shards if shards.is_dir() else shards.parent
    for place in dict.fromkeys([folder / MANIFEST, *_places(shards, cache)]):
        if place.is_file():
            listed = {shard.name: shard for shard in parse(place.read_bytes(), place).shards}
            if shards.is_dir() or shards.name in listed:
                return place, listed
    return None


def build(shards: Path, cache: Path, ignore: Collection[str] = ()) -> tuple[Path, list[Shard]]:
    """Reads every shard from end to end and keeps what it holds: the place of the manifest, beside
    the shards or where nobody may write there in `cache`, and what it lists."""
    paths = tars_of(shards)
    with Hashed(shards, cache) as hashed:
        stamps = [hashed.stamp(path) for path in paths]
        made = index(paths, ignore)
        for path, shard, stamp in zip(paths, made, stamps, strict=True):
            hashed.known[path.name] = [*stamp, shard.sha256]
    return _keep(Manifest(shards=tuple(made)), _places(shards, cache)), made


class Hashed:
    """The shards whose SHA-256 was taken on this machine: size, time of change in nanoseconds, and
    digest of each, kept in the cache. What changes a file and neither of the first two is left to
    the CRC-32 of each sample, which is compared at every read."""

    def __init__(self, shards: Path, cache: Path) -> None:
        self.place = cache / "hashed" / f"{_identity(shards)}.json"
        self.known: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            found = json.loads(self.place.read_text(encoding="utf-8"))
            self.known = found if isinstance(found, dict) else {}
        self.before = dict(self.known)

    def __enter__(self) -> Hashed:
        return self

    def __exit__(self, *_: object) -> None:
        if self.known == self.before:
            return
        with suppress(OSError):  # without it the next run hashes once more
            self.place.parent.mkdir(parents=True, exist_ok=True)
            with whole(self.place) as part:
                part.write_text(json.dumps(self.known), encoding="utf-8")

    @staticmethod
    def stamp(path: Path) -> list[int]:
        stat = path.stat()
        return [stat.st_size, stat.st_mtime_ns]

    def sha256(self, path: Path) -> str:
        stamp = self.stamp(path)
        known = self.known.get(path.name)
        if not (isinstance(known, list) and known[:-1] == stamp):
            with path.open("rb") as file:
                known = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
            self.known[path.name] = known
        return str(known[-1])


def parse(data: bytes, place: object) -> Manifest:
    """A manifest as it is written; raises ValueError if it is none."""
    try:
        return Manifest.model_validate_json(data)
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


def _unchanged(path: Path, shard: Shard, place: Path, hashed: Hashed) -> Shard:
    size = path.stat().st_size
    if size != shard.size:
        held = len(shard.samples) + len(shard.bad)
        raise ValueError(
            f"{path}: {size} bytes, {place.name} lists {shard.size} with {held} samples; "
            + _mend(place)
        )
    if hashed.sha256(path) != shard.sha256:
        raise ValueError(f"{path}: not the bytes that {place.name} lists; {_mend(place)}")
    return shard


def _identity(shards: Path) -> str:
    return hashlib.sha256(str(shards.resolve()).encode()).hexdigest()[:24]


def _places(shards: Path, cache: Path) -> list[Path]:
    """Where the manifest of these shards is written, the best place first."""
    beside = shards / MANIFEST if shards.is_dir() else shards.with_suffix(f".{MANIFEST}")
    return [beside, cache / "shards" / f"{_identity(shards)}.json"]


def _mend(place: Path) -> str:
    return f"copy the shards again, or if the change is meant remove {place}, and it is made anew"


def _keep(found: Manifest, places: Sequence[Path]) -> Path:
    for place in places[:-1]:
        with suppress(OSError):  # a data folder that only others may write
            save(found, place)
            return place
    save(found, places[-1])
    return places[-1]
