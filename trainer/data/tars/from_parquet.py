"""Pictures and captions of parquet files, as the Hugging Face Hub keeps data sets: a column of
pictures, {bytes, path} or plain bytes, and a column of texts. They are written once into shards in
the cache, which are then read, checked and shuffled as any others.

Nothing of a file is unpickled, and no address in it is opened.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.common.left_by_systems import own_files
from trainer.common.long_work import long_work
from trainer.data.tars.manifest import MANIFEST
from trainer.data.tars.shard_checksums import Hashed
from trainer.data.tars.write_shards import Record, write_shards

SPLIT = re.compile(r"(.+?)-\d+-of-\d+", re.ASCII)  # train-00000-of-00002.parquet
CAPTIONS = ("text", "caption")  # columns, where none is named
AT_ONCE, PER_SHARD = 16, 1000  # rows in memory; samples of a shard
EXTENSIONS = ((b"\x89PNG", "png"), (b"RIFF", "webp"))  # any other picture is tried as a JPEG


def _plain(folder: Path) -> list[Path]:
    """The .parquet files of a folder, but hidden ones, as a Mac leaves beside files it copies."""
    return own_files(folder, ".parquet")


def parquets_of(place: Path, split: str | None) -> list[Path]:
    """The files of a folder, or of `data/` in it, sorted; or the given file. split: as in
    train-00000-of-00002.parquet.

    Raises:
        ValueError: there is none, or files of several splits and no word which.
    """
    expected = "expected a .parquet, or a folder of them"
    if not place.exists():
        raise ValueError(f"{place}: no such file or folder; {expected}")
    if not place.is_dir():
        if place.suffix != ".parquet":
            raise ValueError(f"{place}: not a .parquet; {expected}")
        return [place]
    found = _plain(place) or _plain(place / "data")
    if not found:
        raise ValueError(f"{place}: no .parquet in this folder; {expected}")
    own = [(name[1] if (name := SPLIT.fullmatch(path.stem)) else path.stem) for path in found]
    splits = sorted({name for path, name in zip(found, own, strict=True) if name != path.stem})
    if split is None and len(splits) > 1:
        raise ValueError(
            f"{place}: files of {', '.join(splits)}; choose one, as in data.split={splits[-1]}"
        )
    if split is None:
        return found
    chosen = [path for path, name in zip(found, own, strict=True) if name == split]
    if not chosen:
        has = ", ".join(splits) or "files without a split in their names"
        raise ValueError(f"{place}: no file of data.split={split}; it has {has}")
    return chosen


def opened(path: Path) -> Any:
    """A parquet file; raises ValueError for one that is damaged, ModuleNotFoundError without
    pyarrow."""
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"{path}: reading parquet needs {missing.name}: pip install "
            "'attention-trainer[parquet]'"
        ) from missing
    try:
        return parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); copy it again") from error


def caption_column(path: Path, image: str, caption: str | None) -> str:
    """The name of the column of captions, `caption` or the one that is there.

    Raises:
        ValueError: the file has no such columns, or they hold something else; the columns it has
            are named.
    """
    schema = opened(path).schema_arrow
    from pyarrow import types

    has = f"it has {', '.join(schema.names)}"
    if image not in schema.names:
        raise ValueError(f"{path}: no column {image}; {has}; choose by data.image_column")
    own = [name for name in ((caption,) if caption else CAPTIONS) if name in schema.names]
    if len(own) != 1:
        none = f"no column {caption or 'of captions'}" if not own else f"both {' and '.join(own)}"
        raise ValueError(f"{path}: {none}; {has}; choose by data.caption_column")
    kind = schema.field(own[0]).type
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise ValueError(f"{path}: column {own[0]} holds {kind} and no text; choose another")
    kind = schema.field(image).type
    if types.is_struct(kind):
        kind = next((each.type for each in kind if each.name == "bytes"), kind)
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise ValueError(f"{path}: column {image} holds {kind} and no pictures; choose another")
    return own[0]


def as_shards(paths: Sequence[Path], image: str, caption: str, *, cache: Path) -> Path:
    """The folder of shards with the rows of these files; written at the first use. A row that is no
    picture with a caption is in it as it is, for the reader of shards to name."""
    digest = hashlib.sha256(repr(("parquet-1", image, caption)).encode())
    for path in paths:
        with Hashed(path.parent, cache) as hashed:
            digest.update(f"{path.name} {hashed.sha256(path)}".encode())
    folder = cache / "parquet" / digest.hexdigest()[:24]
    if (folder / MANIFEST).is_file():
        return folder
    total = sum(opened(path).metadata.num_rows for path in paths)
    with long_work("rows of parquet", total) as advance:
        records = (row for path in paths for row in _rows(path, image, caption, advance=advance))
        try:
            write_shards(folder, records, per_shard=PER_SHARD, keep_bad=True)
        except (OSError, ValueError):
            if not (folder / MANIFEST).is_file():  # unless another rank has just written it
                raise
    return folder


def _rows(path: Path, image: str, caption: str, *, advance: Any) -> Iterator[Record]:
    stem = re.sub(r"[./\\]", "_", path.stem)
    number = 0
    for batch in opened(path).iter_batches(batch_size=AT_ONCE, columns=[image, caption]):
        for row in batch.to_pylist():
            found, text = row[image], row[caption]
            data = found.get("bytes") if isinstance(found, dict) else found
            members = {} if text is None else {"txt": text.encode()}
            if data is not None:
                kind = next((name for magic, name in EXTENSIONS if data.startswith(magic)), "jpg")
                members[kind] = data
            yield f"{stem}-row{number}", members or {"txt": b""}
            number += 1
        advance(batch.num_rows)
