"""Writes shards in webdataset layout and their manifest: the same samples give the same bytes.

A folder is written under a temporary name and renamed when it is complete on the disk, so a full
disk or an interruption leaves nothing behind. Scenes of the embedded world are stored with the
truth about them:

    scene-<seed>-<index>.png       the image
    scene-<seed>-<index>.txt       its caption
    scene-<seed>-<index>.json      background, relation, and from back to front words and boxes
    scene-<seed>-<index>.mask.png  palette: 0 background, k the visible part of the k-th object
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.common.atomic import beside
from trainer.data.tars.manifest import KNOWN_FIELDS, MANIFEST, MASK, Manifest, index, save_manifest
from trainer.data.world.scenes import Scene, draw_scene
from trainer.data.world.sprites import SETS

Record = tuple[str, Mapping[str, bytes]]
# colours in which viewers show the background and up to three objects
PALETTE = (0, 0, 0, 230, 60, 60, 60, 180, 90, 70, 110, 230)


def write_world(
    folder: str | Path,
    count: int,
    *,
    seed: int = 0,
    sprites: str = "known",
    per_shard: int = 1000,
) -> list[Path]:
    """Writes scenes 0..count-1 of a seed as `world-000000.tar`, ...; returns the shards.

    Raises:
        ValueError: as `write_shards`; no such set of sprites; a count below 1.
    """
    if sprites not in SETS:
        raise ValueError(f"sprites={sprites}: choose one of {', '.join(SETS)}")
    if count < 1:
        raise ValueError(f"count={count}: write at least one scene")
    names = SETS[sprites]
    records = (scene_record(draw_scene(seed, i, names), f"scene-{seed}-{i}") for i in range(count))
    return write_shards(folder, records, per_shard=per_shard, stem="world")


def write_shards(
    folder: str | Path,
    records: Iterable[Record],
    *,
    per_shard: int,
    stem: str = "shard",
    keep_bad: bool = False,
) -> list[Path]:
    """Writes samples, in order, as `<stem>-000000.tar`, ... and a manifest into a new folder.

    Args:
        folder: a new or empty folder.
        records: (key, bytes of each file by extension): one image or video, `txt` or a `json` with
            a caption, and perhaps `mask.png`.
        per_shard: samples in each shard but the last.
        keep_bad: whether samples that readers cannot use are written as they are, and listed as
            such in the manifest.

    Raises:
        ValueError: the folder is not empty, there is no record, readers would not understand a key
            or an extension, or a sample cannot be read back (see `manifest.index`).
    """
    folder = Path(folder)
    with _new_folder(folder) as part:
        paths = _write_all(part, records, per_shard=per_shard, stem=stem)
        found = index(paths)
        if not keep_bad:
            _refuse_bad([f"{shard.name}: {reason}" for shard in found for reason in shard.bad])
        save_manifest(Manifest(shards=tuple(found)), part / MANIFEST)
    return [folder / path.name for path in paths]


def write_unlisted(
    folder: Path, records: Iterable[Record], *, per_shard: int, stem: str
) -> list[Path]:
    """The same without a manifest and without reading anything back; raises as `write_shards`."""
    with _new_folder(folder) as part:
        paths = _write_all(part, records, per_shard=per_shard, stem=stem)
    return [folder / path.name for path in paths]


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which gets its name when the block ends without an error;
    ValueError where that name is taken."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not empty; give a new folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = beside(folder)
    try:
        part.mkdir()
        yield part
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def scene_record(scene: Scene, key: str) -> Record:
    """The members of one scene; the mask has each object's visible pixels exactly."""
    height, width = scene.image.shape[:2]
    owner = np.zeros((height, width), np.uint8)
    for number, placed in enumerate(scene.objects, start=1):
        owner[placed.mask] = number
    mask = Image.frombytes("P", (width, height), owner.tobytes())
    mask.putpalette(PALETTE)
    known = {
        "background": scene.background,
        "relation": scene.relation,
        "words": [placed.word for placed in scene.objects],
        "boxes": [placed.box for placed in scene.objects],
    }
    return key, {
        "png": _png(Image.fromarray(scene.image)),
        "txt": scene.caption.encode(),
        "json": json.dumps(known).encode(),
        MASK: _png(mask),
    }


def _write_all(folder: Path, records: Iterable[Record], *, per_shard: int, stem: str) -> list[Path]:
    """Samples, in order, as `<stem>-000000.tar`, ... in a folder that is there."""
    if per_shard < 1:
        raise ValueError(f"per_shard={per_shard}: put at least one sample into a shard")
    remaining = iter(records)
    paths: list[Path] = []
    while batch := list(islice(remaining, per_shard)):
        paths.append(folder / f"{stem}-{len(paths):06d}.tar")
        _write_one(paths[-1], batch)
    if not paths:
        raise ValueError("there is no record to write; give at least one")
    return paths


def _write_one(path: Path, records: Iterable[Record]) -> None:
    with path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for key, members in records:
                if not re.fullmatch(r"[^./\\]+", key) or not key.isprintable():
                    raise ValueError(
                        f"key {key!r}: use no dot or slash; readers split names at the first dot"
                    )
                for extension, data in members.items():
                    if extension not in KNOWN_FIELDS:
                        known = ", ".join(sorted(KNOWN_FIELDS))
                        raise ValueError(f"{key}.{extension}: unknown extension (known: {known})")
                    info = tarfile.TarInfo(f"{key}.{extension}")  # has no time, owner or host
                    info.size = len(data)
                    archive.addfile(info, BytesIO(data))
        file.flush()
        os.fsync(file.fileno())  # the rename must not reach the disk before these bytes


def _refuse_bad(bad: list[str]) -> None:
    if bad:
        raise ValueError(f"{len(bad)} samples could not be read back, such as {bad[0]}")


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
