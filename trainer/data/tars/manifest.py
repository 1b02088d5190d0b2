"""The index of a tar in webdataset layout: position and CRC-32 of its members, and its errors.

Each tar is read once, and every image and video decoded; the result is kept in a manifest beside
the shards.
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
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from trainer.common.atomic import written_atomically
from trainer.common.left_by_systems import left_by_system
from trainer.data.tars.quick_headers import QuickInfo
from trainer.media.images import DAMAGED_IMAGE, ImageError, decode_image
from trainer.media.mask_files import weights_of
from trainer.media.photo_listing import WEB_IMAGES
from trainer.media.read_caption import decode_caption
from trainer.media.read_video import VideoFacts, examine

MAX_MEMBER = 64 * 2**20
IMAGES = frozenset(suffix[1:] for suffix in WEB_IMAGES)
CAPTION, METADATA, MASK, VIDEO = "txt", "json", "mask.png", "mp4"
LATENT, CELLS = "latent.npy", "cells.npy"  # what a VAE made of a picture, and of its mask
KNOWN_FIELDS = IMAGES | {CAPTION, METADATA, MASK, VIDEO, LATENT, CELLS}
PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")  # webdataset's decoders would execute these
MASK_MODES = ("P", "L", "1")  # of Pillow: palette, grey, black and white
MANIFEST = "manifest.json"


class Member(NamedTuple):
    """Position and size of a member in its shard, in bytes, and its CRC-32."""

    offset: NonNegativeInt
    size: NonNegativeInt
    crc32: int


class Listed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(Listed):
    """One sample: its members by extension, the size of its upright image or frames in pixels, the
    facts of its video, which are called `film` in the file, and whether its mask weighs the loss,
    which an index of an earlier version does not say."""

    key: str
    width: PositiveInt
    height: PositiveInt
    members: dict[str, Member]
    video: VideoFacts | None = Field(None, alias="film")
    weighs: Literal[True] | None = None

    @field_validator("members")
    @classmethod
    def _is_complete(cls, members: dict[str, Member]) -> dict[str, Member]:
        # manifests are untrusted, as are the shards they come with
        media = members.keys() & (IMAGES | {VIDEO})
        if len(media) != 1 or not members.keys() & {CAPTION, METADATA}:
            raise ValueError("a sample has one image or video, and a caption")
        return members

    @model_validator(mode="after")
    def _knows_its_video(self) -> Entry:
        if (VIDEO in self.members) != (self.video is not None):
            raise ValueError("a sample with a video has its facts as `film`, and no other has")
        return self


class Shard(Listed):
    """The samples of one tar; bad: a sentence for each sample that cannot be used."""

    name: str
    size: int
    sha256: str
    samples: tuple[Entry, ...]
    bad: tuple[str, ...] = ()


class Manifest(Listed):
    format: Literal["attention-trainer-shards-1"] = "attention-trainer-shards-1"
    shards: tuple[Shard, ...]


def index(paths: Sequence[Path], ignore: Collection[str] = ()) -> list[Shard]:
    """Reads tars completely: checks every member, decodes every image and video once.

    Raises:
        ValueError: a truncated or compressed tar; links, absolute or upward names, pickles, unknown
            extensions not in `ignore`, members over 64 MiB; a duplicate key.
    """
    seen: dict[str, str] = {}
    return [_index_one(path, seen, ignore) for path in paths]


def save_manifest(found: Manifest, place: Path) -> None:
    """Writes a manifest; the file is replaced in one step, so it is never incomplete."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(place) as part:
        part.write_text(
            found.model_dump_json(exclude_none=True, by_alias=True) + "\n", encoding="utf-8"
        )


def caption_of(members: Mapping[str, bytes], name: str) -> str:
    """The text of the .txt, else the `caption` of the .json; ImageError without either."""
    if CAPTION in members:
        return decode_caption(members[CAPTION], f"{name}.{CAPTION}")
    caption = metadata_of(members[METADATA], name).get("caption") if METADATA in members else None
    if not isinstance(caption, str):
        raise ImageError(f"{name}: an image without a caption; add {name}.txt after it")
    return caption.strip()


def metadata_of(data: bytes, name: str) -> dict[str, Any]:
    """The object in a .json; raises ImageError if it is something else."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{name}.json: not readable as JSON ({error}); write it again") from error
    if not isinstance(found, dict):
        raise ImageError(f"{name}.json: not an object of named values; write it again")
    return found


def mask_of(data: bytes, name: str, size: tuple[int, int]) -> np.ndarray:
    """The values of a mask as uint8 (height, width), of a palette its indices; ImageError unless
    its size is `size` = (width, height)."""
    return np.array(_mask(data, name, size), dtype=np.uint8)


def loss_weights_of(data: bytes, name: str, size: tuple[int, int]) -> Image.Image | None:
    """How much each pixel counts in the loss, 8-bit grey, of a mask in grey, see `mask_files.py`.
    None of a mask with a palette, which numbers the objects of a scene and weighs nothing.

    Raises:
        ImageError: as `mask_of`, or it is all black.
    """
    mask = _mask(data, name, size)
    if mask.mode == "P":
        return None
    return weights_of(mask.convert("RGB"), f"{name}.{MASK}", lossless=True)


def _mask(data: bytes, name: str, size: tuple[int, int]) -> Image.Image:
    try:
        with Image.open(BytesIO(data), formats=("PNG",)) as image:
            if image.size == size and image.mode in MASK_MODES:  # before a pixel is decoded
                image.load()
                return image
            got = f"{image.size[0]}x{image.size[1]} {image.mode}"
    except (*DAMAGED_IMAGE, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}.{MASK}: damaged or no PNG ({error}); write it again") from error
    raise ImageError(
        f"{name}.{MASK}: {got}; a mask is grey, or numbers objects with a palette, in 8 bits and "
        f"{size[0]}x{size[1]}"
    )


def _index_one(path: Path, seen: dict[str, str], ignore: Collection[str]) -> Shard:
    samples: list[Entry] = []
    bad: list[str] = []
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        members = members_of(path, file, ignore)
        for key, group in groupby(members, lambda member: member[0]):
            if key in seen:
                raise ValueError(
                    f"{path}: duplicate key {key!r}, already in {seen[key]}; the members of a "
                    "sample must be adjacent, and each sample needs its own key"
                )
            seen[key] = path.name
            try:
                samples.append(_entry(path, file, key=key, group=group))
            except ImageError as error:
                bad.append(str(error))
    if not samples and not bad:
        raise ValueError(f"{path}: this shard has no sample; remove it or copy it again")
    size = path.stat().st_size
    return Shard(name=path.name, size=size, sha256=digest, samples=tuple(samples), bad=tuple(bad))


def members_of(
    path: Path | str, file: BinaryIO, ignore: Collection[str], start: int = 0
) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, extension and header of each file from the byte `start` on, where one begins; raises
    ValueError unless the tar has its end mark."""
    end = start
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=QuickInfo) as archive:
            for info in archive:
                key, extension = _split(info.name)
                left = left_by_system(info.name)
                _check_member(path, info, ignore, extension=extension, left=left)
                blocks = -(-info.size // 512) if info.isreg() else 0
                end = info.offset_data + blocks * 512
                if info.isreg() and extension in KNOWN_FIELDS and not left:
                    yield key, extension, info
                archive.members = []  # type: ignore[attr-defined] # it keeps every header
    except tarfile.TarError as error:
        raise _cut(path, str(error)) from error
    file.seek(end)
    rest = file.read(2**20)
    # tarfile takes a broken header, or the end of the file, for the end of the archive
    if len(rest) < 1024 or rest.strip(b"\0") or file.read(1):
        raise _cut(path, f"no end mark after byte {end}")


def _check_member(
    path: Path | str, info: tarfile.TarInfo, ignore: Collection[str], *, extension: str, left: bool
) -> None:
    """extension, left: of its name, as of `_split` and `left_by_system`."""
    name = info.name
    reason = ""
    if name.startswith("/") or ".." in name.split("/") or re.search(r"\\|^[A-Za-z]:", name):
        reason = "an absolute or upward name; pack the files by plain names"
    elif left and info.size >= 0:  # one below 0 is refused, as any member
        return
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
    elif extension not in KNOWN_FIELDS and extension and extension not in ignore:
        known = ", ".join(sorted(KNOWN_FIELDS))
        reason = f"an unknown extension (known: {known}); list it in data.ignore to ignore it"
    if reason:
        raise ValueError(f"{path}: member {name!r}: {reason}")


def _split(name: str) -> tuple[str, str]:
    """Key and extension, split at the first dot of the file's name as webdataset does; two "" for a
    hidden file."""
    found = re.fullmatch(r"((?:.*/|)[^./]+)[.]([^/]*)", name)
    return (found[1], found[2].lower()) if found else ("", "")


def _entry(
    path: Path, file: BinaryIO, *, key: str, group: Iterator[tuple[str, str, tarfile.TarInfo]]
) -> Entry:
    data: dict[str, bytes] = {}
    parts: dict[str, Member] = {}
    for _, extension, info in group:
        if extension in data:
            raise ValueError(f"{path}: duplicate key {key!r}: it has two .{extension} members")
        file.seek(info.offset_data)
        data[extension] = file.read(info.size)
        if len(data[extension]) != info.size:
            raise _cut(path, f"the file ends within {info.name}")
        parts[extension] = Member(info.offset_data, info.size, zlib.crc32(data[extension]))
    media = sorted(data.keys() & (IMAGES | {VIDEO}))
    if len(media) != 1:
        members = ", ".join(f".{extension}" for extension in sorted(data))
        raise ImageError(
            f"{key}: {len(media)} images among {members}; a sample has one image, or one video"
        )
    video = examine(data[VIDEO], f"{key}.{VIDEO}") if VIDEO in data else None
    size = video[:2] if video else decode_image(data[media[0]], f"{key}.{media[0]}").size
    caption_of(data, key)
    weighs = MASK in data and loss_weights_of(data[MASK], key, size) is not None
    if METADATA in data:
        metadata_of(data[METADATA], key)
    return Entry(
        key=key, width=size[0], height=size[1], members=parts, film=video, weighs=weighs or None
    )


def _cut(path: Path | str, why: str) -> ValueError:
    return ValueError(
        f"{path}: truncated, damaged or compressed ({why}); copy it again as a plain .tar"
    )
