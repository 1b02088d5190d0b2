"""Finds, makes, checks and stores the manifest of a set of shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.common.atomic import written_atomically
from trainer.common.left_by_systems import own_files
from trainer.data.tars.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    index,
    save_manifest,
)
from trainer.data.tars.shard_names import is_pattern, names_of


def holds_tars(place: Path) -> bool:
    """Whether a path is a .tar, or a folder with some."""
    if place.is_dir():
        return bool(_tars_in(place))
    return place.suffix == ".tar"


def tars_of(shards: Path) -> list[Path]:
    """The .tar files of a folder, sorted by name; the given .tar; or those of a pattern of names.

    Raises:
        ValueError: the path is missing, is not a .tar, or is a folder without any.
    """
    expected = "expected a folder of .tar files in webdataset layout, or one .tar"
    if is_pattern(shards.name) and not shards.exists():
        return _of_pattern(shards)
    if not shards.exists():
        raise ValueError(f"{shards}: no such file or folder; {expected}")
    if shards.is_dir():
        paths = _tars_in(shards)
        if not paths:
            raise ValueError(f"{shards}: no .tar in this folder; {expected}, not compressed")
        return paths
    if shards.suffix != ".tar":
        raise ValueError(f"{shards}: not a .tar; {expected}, not compressed")
    return [shards]


def _tars_in(folder: Path) -> list[Path]:
    return own_files(folder, ".tar")


def _of_pattern(shards: Path) -> list[Path]:
    paths = [shards.with_name(name) for name in names_of(shards.name)]
    if strange := [path for path in paths if path.suffix != ".tar" or path.parent != shards.parent]:
        raise ValueError(f"{shards}: {strange[0].name} is not the name of a .tar")
    if missing := [path.name for path in paths if not path.is_file()]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{shards}: {', '.join(missing[:3])}{more} missing; copy them there, or write a "
            "pattern of those that are"
        )
    return paths


def load_manifest(
    shards: Path, cache: Path, ignore: Collection[str] = (), *, keep: bool = True
) -> list[Shard]:
    """The shards with their samples, from the manifest beside them or in `cache`. A missing
    manifest is made, and stored with `keep`.

    Raises:
        ValueError: a shard differs from the manifest; anything `index` refuses.
    """
    kept = kept_manifest(shards, cache)
    if kept is None:
        if keep:
            return build_manifest(shards, cache, ignore)[1]
        return index(tars_of(shards), ignore)
    paths, (place, listed) = tars_of(shards), kept
    if shards.is_dir():
        _check_names({path.name for path in paths}, listed.keys(), place)
    with Hashed(shards, cache) as hashed:
        return [_unchanged(path, listed[path.name], place=place, hashed=hashed) for path in paths]


def kept_manifest(shards: Path, cache: Path) -> tuple[Path, dict[str, Shard]] | None:
    """The path of the stored manifest, and its shards by name; None if there is no manifest.

    Raises:
        ValueError: the file at that path is not a manifest.
    """
    folder = shards if shards.is_dir() else shards.parent
    for place in dict.fromkeys([folder / MANIFEST, *_places(shards, cache)]):
        if place.is_file():
            listed = {
                shard.name: shard for shard in parse_manifest(place.read_bytes(), place).shards
            }
            if shards.is_dir() or all(path.name in listed for path in tars_of(shards)):
                return place, listed
    return None


def build_manifest(
    shards: Path, cache: Path, ignore: Collection[str] = ()
) -> tuple[Path, list[Shard]]:
    """Reads every shard completely and stores a manifest beside the shards, or in `cache` if that
    folder is not writable. Returns the manifest's path and its shards."""
    paths = tars_of(shards)
    with Hashed(shards, cache) as hashed:
        stamps = [hashed.stamp(path) for path in paths]
        made = index(paths, ignore)
        for path, shard, stamp in zip(paths, made, stamps, strict=True):
            hashed.known[path.name] = [*stamp, shard.sha256]
    return _keep(Manifest(shards=tuple(made)), _places(shards, cache)), made


class Hashed:
    """SHA-256 digests that this machine has computed, in the cache: of each shard its size, time of
    change in nanoseconds, and digest. A change of the bytes that changes neither size nor time is
    found by the CRC-32 of each member, which is checked at every read."""

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
        with suppress(OSError):  # without this file the next run computes the digests again
            self.place.parent.mkdir(parents=True, exist_ok=True)
            with written_atomically(self.place) as part:
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


def parse_manifest(data: bytes, place: object) -> Manifest:
    """A manifest from its JSON; raises ValueError if it is not a manifest."""
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise ValueError(
            f"{place}: not a manifest of shards ({why}); move it away, and a new one is made"
        ) from error


def _check_names(there: Collection[str], listed: Collection[str], place: Path) -> None:
    missing, new = sorted(set(listed) - set(there)), sorted(set(there) - set(listed))
    if missing or new:
        reasons = [f"{name} is missing" for name in missing]
        reasons += [f"{name} is not in it" for name in new]
        raise ValueError(f"{place}: {', '.join(reasons)}; {_advice(place)}")


def _unchanged(path: Path, shard: Shard, *, place: Path, hashed: Hashed) -> Shard:
    """`shard`; raises ValueError if the file differs from it."""
    size = path.stat().st_size
    if size != shard.size:
        samples = len(shard.samples) + len(shard.bad)
        raise ValueError(
            f"{path}: {size} bytes, {place.name} lists {shard.size} with {samples} samples; "
            + _advice(place)
        )
    if hashed.sha256(path) != shard.sha256:
        raise ValueError(f"{path}: not the bytes that {place.name} lists; {_advice(place)}")
    return shard


def _identity(shards: Path) -> str:
    return hashlib.sha256(str(shards.resolve()).encode()).hexdigest()[:24]


def _places(shards: Path, cache: Path) -> list[Path]:
    """The paths where the manifest of these shards may be written, the best first."""
    beside = shards / MANIFEST if shards.is_dir() else shards.with_suffix(f".{MANIFEST}")
    return [beside, cache / "shards" / f"{_identity(shards)}.json"]


def _advice(place: Path) -> str:
    return f"copy the shards again; if you changed them, remove {place}, and a new one is made"


def _keep(found: Manifest, places: Sequence[Path]) -> Path:
    for place in places[:-1]:
        with suppress(OSError):  # a data folder that is not writable
            save_manifest(found, place)
            return place
    save_manifest(found, places[-1])
    return places[-1]
