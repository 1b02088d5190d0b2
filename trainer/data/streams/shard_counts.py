"""How many samples each shard holds, found without a manifest: said by a file beside it, or counted
by the names of its members, once.

Beside `00012.tar` may lie `00012_stats.json` or `00012.parquet`, as img2dataset writes them, and
`manifest.json` of `data build` in its folder. What is counted is kept in the cache by address, size
and tag.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt, TypeAdapter

from trainer.common.atomic import written_atomically
from trainer.common.long_work import long_work
from trainer.data.streams.captions_beside import rows_beside
from trainer.data.streams.server_file import ShardFile, read_whole
from trainer.data.streams.shard_samples import count_samples_in
from trainer.data.tars.manifest import MANIFEST
from trainer.data.tars.shard_checksums import parse_manifest

KEPT = TypeAdapter(list[tuple[PositiveInt, list[NonNegativeInt]]])
AT_ONCE = 16  # shards that are asked about at the same time


Counted = tuple[int, list[int]]  # the samples of a shard, and its marks, see `ShardFile`


def counts_of(
    files: Sequence[ShardFile], cache: Path, ignore: Collection[str] = ()
) -> list[Counted]:
    """The samples and the marks of each shard. cache: the folder for what is kept between runs.

    Raises:
        ValueError: a shard cannot be read, as `members_of` says, or it holds no sample.
        NoAnswerError: the server gives no answer.
    """
    place = cache / "counted" / f"{_key(files, ignore)}.json"
    kept = _kept(place, files)
    if kept is not None:
        return kept
    folders = {file.address.rpartition("/")[0] for file in files}
    manifests = {folder: _manifest(folder) for folder in folders}

    def count(file: ShardFile) -> Counted:
        folder = file.address.rpartition("/")[0]
        said = manifests[folder].get((file.name, file.size)) or _said_beside(file)
        found = (said, []) if said else count_samples_in(file, ignore)
        if not found[0]:
            raise ValueError(f"{file.address}: this shard has no sample; leave it out")
        return found

    found: list[Counted] = []
    with long_work("shards counted", len(files)) as advance, ThreadPoolExecutor(AT_ONCE) as pool:
        for number in pool.map(count, files):
            found.append(number)
            advance(1)
    with suppress(OSError):  # they are counted again
        place.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(place) as part:
            part.write_text(json.dumps(found), encoding="utf-8")
    return found


def _key(files: Sequence[ShardFile], ignore: Collection[str]) -> str:
    every = [(file.address, file.size, file.tag) for file in files]
    return hashlib.sha256(repr(("counts-2", every, sorted(ignore))).encode()).hexdigest()[:24]


def _kept(place: Path, files: Sequence[ShardFile]) -> list[Counted] | None:
    with suppress(OSError, ValueError):
        found = KEPT.validate_json(place.read_bytes())
        if len(found) == len(files):
            return [(count, list(marks)) for count, marks in found]
    return None


def _manifest(folder: str) -> dict[tuple[str, int], int]:
    """The counts of `manifest.json` by name and size of a shard; empty without one."""
    data = read_whole(f"{folder}/{MANIFEST}" if folder else MANIFEST)
    if data is None:
        return {}
    with suppress(ValueError):  # another program's
        shards = parse_manifest(data, folder).shards
        return {(each.name, each.size): len(each.samples) + len(each.bad) for each in shards}
    return {}


def _said_beside(file: ShardFile) -> int | None:
    """The number that img2dataset wrote beside a shard."""
    data = read_whole(f"{file.address.removesuffix('.tar')}_stats.json")
    if data is not None:
        with suppress(ValueError, AttributeError):
            number: Any = json.loads(data).get("successes")
            if type(number) is int and number > 0:
                return number
    return rows_beside(file)
