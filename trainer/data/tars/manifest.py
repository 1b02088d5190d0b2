"""The index of a tar in webdataset layout: where members lie, their CRC-32, and what is wrong.

Each tar is read once, every image and video decoded; the manifest keeps the result beside the
shards.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from trainer.common.atomic import written_whole
from trainer.media.decode import VideoFacts, examine
from trainer.media.images import (
    DAMAGED_IMAGE,
    READABLE_IMAGES,
    ImageError,
    decode_caption,
    decode_image,
)

MAX_MEMBER = 64 * 2**20
IMAGES = frozenset(suffix[1:] for suffix in READABLE_IMAGES)
CAPTION, METADATA, MASK, VIDEO = "txt", "json", "mask.png", "mp4"
KNOWN_FIELDS = IMAGES | {CAPTION, METADATA, MASK, VIDEO}
PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")  # what webdataset's own decoders would execute
MANIFEST = "manifest.json"


class Part(NamedTuple):
    """Where a member's bytes lie in its shard, and their CRC-32."""

    offset: NonNegativeInt
    size: NonNegativeInt
    crc32: int


class Listed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(Listed):
    """One sample: its members by extension, the size of its upright image or frames in pixels, and
    what is known of its video."""

    key: str
    width: PositiveInt
    height: PositiveInt
    members: dict[str, Part]
    film: VideoFacts | None = None

    @field_validator("members")
    @classmethod
    def _is_whole(cls, members: dict[str, Part]) -> dict[str, Part]:
        # Manifests are read from outside, with the shards they come along with.
        media = members.keys() & (IMAGES | {VIDEO})
        if len(media) != 1 or not members.keys() & {CAPTION, METADATA}:
            raise ValueError("a sample has one image or video, and a caption")
        return members

    @model_validator(mode="after")
    def _knows_its_video(self) -> Entry:
        if (VIDEO in self.members) != (self.film is not None):
            raise ValueError("what is known of a video stands beside it")
        return self


class Shard(Listed):
    """What one tar holds; bad: samples that cannot be used, each with the reason."""

    name: str
    size: int
    sha256: str
    samples: tuple[Entry, ...]
    bad: tuple[str, ...] = ()


class Manifest(Listed):
    format: Literal["attention-trainer-shards-1"] = "attention-trainer-shards-1"
    shards: tuple[Shard, ...]


def index(paths: Sequence[Path], ignore: Collection[str] = ()) -> list[Shard]:
    """Reads tars from end to end: every member checked, every image and video decoded once.

    Raises:
        ValueError: a cut or compressed tar; links, absolute or upward names, pickles, unknown
            extensions not in `ignore`, members over 64 MiB; a key that comes twice.
    """
    seen: dict[str, str] = {}
    return [_index_one(path, seen, ignore) for path in paths]


def save_manifest(found: Manifest, place: Path) -> None:
    """Writes a manifest beside its place and renames it: it is there whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(place) as part:
        part.write_text(found.model_dump_json(exclude_none=True) + "\n", encoding="utf-8")


def caption_of(members: Mapping[str, bytes], name: str) -> str:
    """The text of .txt, or without one the `caption` of .json; ImageError if there is neither."""
    if CAPTION in members:
        return decode_caption(members[CAPTION], f"{name}.{CAPTION}")
    caption = metadata_of(members[METADATA], name).get("caption") if METADATA in members else None
    if not isinstance(caption, str):
        raise ImageError(f"{name}: an image without a caption; add {name}.txt after it")
    return caption.strip()


def metadata_of(data: bytes, name: str) -> dict[str, Any]:
    """The object a .json holds; ImageError if it does not."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{name}.json: not readable as JSON ({error}); write it anew") from error
    if not isinstance(found, dict):
        raise ImageError(f"{name}.json: not an object of named values; write it anew")
    return found


def mask_of(data: bytes, name: str, size: tuple[int, int]) -> np.ndarray:
    """Pixel values uint8 (height, width) of a mask of `size` = (width, height), else ImageError."""
    try:
        with Image.open(BytesIO(data), formats=("PNG",)) as image:
            if image.size == size and image.mode in ("P", "L"):  # seen before a pixel is decoded
                return np.array(image)
            got = f"{image.size[0]}x{image.size[1]} {image.mode}"
    except (*DAMAGED_IMAGE, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}.{MASK}: damaged or no PNG ({error}); write it anew") from error
    raise ImageError(f"{name}.{MASK}: {got}, not an 8-bit palette of {size[0]}x{size[1]}")


def _index_one(path: Path, seen: dict[str, str], ignore: Collection[str]) -> Shard:
    samples: list[Entry] = []
    bad: list[str] = []
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        members = _members(path, file, ignore)
        for key, group in groupby(members, lambda member: member[0]):
            if key in seen:
                raise ValueError(
                    f"{path}: duplicate key {key!r}, already in {seen[key]}; the members of a "
                    "sample stand together, and no two samples share a key"
                )
            seen[key] = path.name
            try:
                samples.append(_entry(path, file, key, group))
            except ImageError as error:
                bad.append(str(error))
    if not samples and not bad:
        raise ValueError(f"{path}: no sample in this shard; remove it or copy it again")
    size = path.stat().st_size
    return Shard(name=path.name, size=size, sha256=digest, samples=tuple(samples), bad=tuple(bad))


def _members(
    path: Path, file: BinaryIO, ignore: Collection[str]
) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, extension and header of each file; refuses the shard unless it ends as a tar must."""
    end = 0
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                _check_member(path, info, ignore)
                blocks = -(-info.size // 512) if info.isreg() else 0
                end = info.offset_data + blocks * 512
                key, extension = _split(info.name)
                if info.isreg() and extension in KNOWN_FIELDS:
                    yield key, extension, info
    except tarfile.TarError as error:
        raise _cut(path, str(error)) from error
    file.seek(end)
    rest = file.read(2**20)
    # tarfile takes a broken header, or the end of the file, for the end of the archive.
    if len(rest) < 1024 or rest.strip(b"\0") or file.read(1):
        raise _cut(path, f"no end mark after byte {end}")


def _check_member(path: Path, info: tarfile.TarInfo, ignore: Collection[str]) -> None:
    name = info.name
    reason = ""
    if name.startswith("/") or ".." in name.split("/") or re.search(r"\\|^[A-Za-z]:", name):
        reason = "an absolute or upward name; pack the files by plain names"
    elif not name.isprintable():
        reason = "a name with control characters; rename the file"
    elif info.isdir():
        return
    elif not info.isreg() or info.issparse():
        reason = "a link or a special file; pack the file itself"
    elif not 0 <= info.size <= MAX_MEMBER:
        reason = f"{info.size:,} bytes, the limit is {MAX_MEMBER:,}; store a smaller version"
    elif name.lower().rpartition(".")[2] in PICKLES:
        reason = "a pickle can run code when it is read; store .npy or safetensors elsewhere"
    elif _split(name)[1] not in KNOWN_FIELDS.union(ignore, ("",)):
        known = ", ".join(sorted(KNOWN_FIELDS))
        reason = f"an extension not known ({known}); name it in data.ignore to pass over it"
    if reason:
        raise ValueError(f"{path}: member {name!r}: {reason}")


def _split(name: str) -> tuple[str, str]:
    """Key and extension as webdataset splits them, at the first dot; nothing of a hidden file."""
    found = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", name)
    return (found[1], found[2].lower()) if found else ("", "")


def _entry(
    path: Path, file: BinaryIO, key: str, group: Iterator[tuple[str, str, tarfile.TarInfo]]
) -> Entry:
    data: dict[str, bytes] = {}
    parts: dict[str, Part] = {}
    for _, extension, info in group:
        if extension in data:
            raise ValueError(f"{path}: duplicate key {key!r}: it has two .{extension} members")
        file.seek(info.offset_data)
        data[extension] = file.read(info.size)
        if len(data[extension]) != info.size:
            raise _cut(path, f"the file ends within {info.name}")
        parts[extension] = Part(info.offset_data, info.size, zlib.crc32(data[extension]))
    media = sorted(data.keys() & (IMAGES | {VIDEO}))
    if len(media) != 1:
        held = ", ".join(f".{extension}" for extension in sorted(data))
        raise ImageError(
            f"{key}: {len(media)} images among {held}; a sample has one image, or one video"
        )
    film = examine(data[VIDEO], f"{key}.{VIDEO}") if VIDEO in data else None
    size = film[:2] if film else decode_image(data[media[0]], f"{key}.{media[0]}").size
    caption_of(data, key)
    if MASK in data:
        mask_of(data[MASK], key, size)
    if METADATA in data:
        metadata_of(data[METADATA], key)
    return Entry(key=key, width=size[0], height=size[1], members=parts, film=film)


def _cut(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: cut, damaged or compressed ({why}); copy it again as a plain .tar")
