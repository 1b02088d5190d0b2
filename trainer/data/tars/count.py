"""How many samples shards have, before they are opened: by their manifest, or where there is none
yet by the names of their members, without reading a picture."""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby
from pathlib import Path

from trainer.common.paths import cache_folder
from trainer.data.tars.manifest import IMAGES, VIDEO, members_of
from trainer.data.tars.shard_checksums import kept_manifest, tars_of


def count_samples(shards: Path, ignore: Collection[str] = ()) -> int:
    """Raises ValueError for a tar that cannot be read, as `index` does."""
    paths, kept = tars_of(shards), kept_manifest(shards, cache_folder())
    listed = {} if kept is None else kept[1]
    if all(path.name in listed for path in paths):
        return sum(len(listed[path.name].samples) for path in paths)
    return sum(_count(path, ignore) for path in paths)


def _count(path: Path, ignore: Collection[str]) -> int:
    with path.open("rb") as file:
        groups = groupby(members_of(path, file, ignore), lambda member: member[0])
        media = [{extension for _, extension, _ in group} for _, group in groups]
    return sum(len(own & (IMAGES | {VIDEO})) == 1 for own in media)
