"""Finds errors in shards or in a folder of photos: compares every byte with the manifest, decodes
every picture. Each error is one sentence that names the shard and the sample."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

from trainer.data.tars.manifest import MAX_MEMBER, Shard, index
from trainer.data.tars.shard_checksums import kept_manifest, tars_of
from trainer.media.photo_folder import read_folder


def photos(folder: Path) -> tuple[list[str], str]:
    """A sentence for each photo or caption of a folder that cannot be used, and a summary."""
    good, bad = read_folder(folder, "skip", size=16)
    return [reason for _, reason in bad], f"{len(good)} of {len(good) + len(bad)} photos are fine"


def shards(place: Path, cache: Path, ignore: Collection[str] = ()) -> tuple[list[str], str]:
    """A sentence for each error in shards, and a summary.

    Raises:
        ValueError: the shards have no manifest, or there is no shard.
    """
    paths = {path.name: path for path in tars_of(place)}
    kept = kept_manifest(place, cache)
    if kept is None:
        raise ValueError(
            f"{place}: no manifest to compare the shards with; `data build shards={place}` makes it"
        )
    at, listed = kept
    if not place.is_dir():
        listed = {name: listed[name] for name in paths}
    found = [
        f"{name}: the shard is missing, and {len(shard.samples)} samples with it"
        for name, shard in listed.items()
        if name not in paths
    ]
    found += [f"{name}: not in {at.name}" for name in paths if name not in listed]
    for name, shard in listed.items():
        found += [f"{name}: {reason}" for reason in shard.bad]
        if name in paths:
            found += _of_shard(paths[name], shard, ignore)
    samples = sum(len(shard.samples) for shard in listed.values())
    size = sum(shard.size for shard in listed.values())
    return found, f"{len(listed)} shards, {samples} samples, {size:,} bytes by {at}"


def _of_shard(path: Path, shard: Shard, ignore: Collection[str]) -> list[str]:
    found, size = [], path.stat().st_size
    if size != shard.size:
        found.append(f"{path.name}: {size:,} bytes, and had {shard.size:,}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest == shard.sha256:  # the manifest itself may be wrong
        return [*found, *_by_place(path, shard)]
    try:
        (present,) = index([path], ignore)
    except ValueError as error:
        return [*found, str(error).removeprefix(f"{path.parent}/"), *_by_place(path, shard)]
    found += _differences(shard, present)
    return found or [f"{path.name}: all samples are as listed, but the tar was packed again"]


def _by_place(path: Path, shard: Shard) -> Iterator[str]:
    """A sentence for each member whose bytes differ from those that the manifest lists."""
    with path.open("rb") as file:
        for entry in shard.samples:
            for extension, part in entry.members.items():
                file.seek(part.offset)
                data = file.read(min(part.size, MAX_MEMBER))
                if len(data) < part.size:
                    yield f"{path.name}: {entry.key}.{extension} is truncated"
                elif zlib.crc32(data) != part.crc32:
                    yield f"{path.name}: {entry.key}.{extension} has other bytes than were listed"


def _differences(shard: Shard, present: Shard) -> Iterator[str]:
    """A sentence for each difference between two lists of one shard, whatever their order."""
    now = {entry.key: entry for entry in present.samples}
    before = {entry.key: entry for entry in shard.samples}
    for key, entry in before.items():
        if key not in now:
            reasons = [each for each in present.bad if each.startswith((f"{key}.", f"{key}:"))]
            yield f"{shard.name}: {reasons[0] if reasons else f'sample {key} is missing'}"
            continue
        for extension in sorted(entry.members.keys() | now[key].members.keys()):
            one, other = entry.members.get(extension), now[key].members.get(extension)
            if one is None or other is None:
                what = "was not there" if one is None else "is missing"
                yield f"{shard.name}: {key}.{extension} {what}"
            elif (one.size, one.crc32) != (other.size, other.crc32):
                yield f"{shard.name}: {key}.{extension} has other bytes than were listed"
    yield from (f"{shard.name}: sample {key} was not there" for key in now if key not in before)
