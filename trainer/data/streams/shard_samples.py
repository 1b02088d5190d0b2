"""The samples of one shard in their order, as bytes: members are read by webdataset's grouping of
names, after the checks of every member that all readers of shards make. Nothing is decoded here,
and a pickle is refused by its name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, BinaryIO

from trainer.data.streams.server_file import ShardFile, opened_shard
from trainer.data.tars.manifest import (
    IMAGES,
    KNOWN_FIELDS,
    LATENT,
    METADATA,
    members_of,
    metadata_of,
)
from trainer.media.images import ImageError

EVERY = 32  # samples from one mark to the next


@dataclass(frozen=True)
class Raw:
    """A sample's members by extension. shard: its address; picture: the extension of its picture,
    or of the latents in its place."""

    shard: str
    key: str
    picture: str
    members: Mapping[str, bytes]

    @property
    def name(self) -> str:
        return f"{self.shard}: {self.key}"

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The object in its .json, empty without one; raises ImageError as `metadata_of`."""
        return metadata_of(self.members[METADATA], self.name) if METADATA in self.members else {}


def samples_of(
    file: ShardFile, first: int, end: int, *, count: int | None, ignore: Collection[str] = ()
) -> Iterator[Raw]:
    """Samples `first` to `end - 1` of a shard; those before them are passed over unread.

    count: how many it is known to hold, None where more may follow.

    Raises:
        ValueError: it holds fewer samples, or more than `count`; or as `members_of`.
        ImageError: a sample without one picture.
    """
    with opened_shard(file) as tar:
        at = min(first // EVERY, len(file.marks) - 1)
        groups = _groups(file, tar, ignore, start=file.marks[at] if at > 0 else 0)
        passed, number = max(0, at) * EVERY, first
        for group in islice(groups, first - passed, end - passed):
            number += 1
            if number == end == count and next(groups, None) is not None:
                raise _miscounted(file, "more", count)
            yield _read(file, tar, group)
    if number < end:
        raise _miscounted(file, "fewer", count or end)


def _miscounted(file: ShardFile, than: str, count: int) -> ValueError:
    return ValueError(
        f"{file.address}: it holds {than} samples than {count}, which was counted or is said "
        "beside it or by data.per_shard; copy the shard and the files beside it again"
    )


def count_samples_in(file: ShardFile, ignore: Collection[str] = ()) -> tuple[int, list[int]]:
    """How many samples a shard holds, by the names of its members, and its marks.

    Raises:
        ValueError, ImageError: as `samples_of`.
    """
    count, marks = 0, list[int]()
    with opened_shard(file) as tar:
        for group in _groups(file, tar, ignore):
            _picture(file, group)
            if count % EVERY == 0:
                marks.append(min(group[name].offset for name in group.keys() & KNOWN_FIELDS))
            count += 1
    return count, marks


def _groups(
    file: ShardFile, tar: BinaryIO, ignore: Collection[str], start: int = 0
) -> Iterator[dict[str, Any]]:
    """Each sample from the byte `start` on as its members' headers by extension, with `__key__`."""
    from webdataset.tariterators import group_by_keys  # which imports torch

    members = (
        {"fname": info.name, "data": info, "__url__": file.address}
        for _, _, info in members_of(file.address, tar, ignore, start=start)
    )
    seen: set[str] = set()
    try:
        for group in group_by_keys(members):
            key = group["__key__"]
            if key in seen:
                raise ValueError(
                    f"{file.address}: duplicate key {key!r}; the members of a sample must be "
                    "adjacent, and each sample needs its own key"
                )
            seen.add(key)
            yield group
    except ValueError as error:
        if len(error.args) == 1:
            raise
        name = str(error.args[0]).partition(": ")[0]
        raise ValueError(f"{file.address}: {name} is in it twice; remove one") from None


def _picture(file: ShardFile, group: Mapping[str, Any]) -> str:
    """The extension of a sample's picture, or of the latents in its place."""
    pictures = sorted(group.keys() & (IMAGES | {LATENT}))
    if len(pictures) != 1:
        members = ", ".join(f".{name}" for name in sorted(group.keys() & KNOWN_FIELDS))
        raise ImageError(
            f"{file.address}: {group['__key__']}: {len(pictures)} images among {members}; a sample "
            "has one image"
        )
    return pictures[0]


def _read(file: ShardFile, tar: BinaryIO, group: Mapping[str, Any]) -> Raw:
    picture, found = _picture(file, group), {}
    for name in group.keys() & KNOWN_FIELDS:
        info = group[name]
        tar.seek(info.offset_data)
        found[name] = tar.read(info.size)
        if len(found[name]) != info.size:
            raise ValueError(f"{file.address}: the file ends within {info.name}; copy it again")
    return Raw(file.address, group["__key__"], picture, members=found)
