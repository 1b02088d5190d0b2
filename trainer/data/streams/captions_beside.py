"""The parquet that img2dataset writes beside each shard: a row for each picture that it tried, with
its key, its status and its caption. Nothing of it is unpickled, and no address in it is opened."""

from __future__ import annotations

import io
from typing import Any

from trainer.data.streams.server_file import ShardFile, read_whole

KEY, STATUS, DONE = "key", "status", "success"


def rows_beside(file: ShardFile) -> int | None:
    """How many pictures of a shard succeeded; None without such a file."""
    table = _table(file, ())
    return None if table is None else sum(_done(table)) or None


def captions_beside(file: ShardFile, column: str) -> dict[str, str]:
    """The captions of a shard by key.

    Raises:
        ValueError: there is no such file, it has no such column, or a column of something else.
    """
    table = _table(file, (column,))
    if table is None:
        raise ValueError(
            f"{_beside(file)}: there is no such file that may be read, where "
            f"data.caption_key={column} is looked for if samples have no .json; leave "
            "data.caption_key out for captions in .txt"
        )
    if column not in table.column_names:
        raise ValueError(
            f"{_beside(file)}: no column {column}; it has {', '.join(_names(file))}; choose one by "
            "data.caption_key"
        )
    rows = zip(table[KEY].to_pylist(), table[column].to_pylist(), _done(table), strict=True)
    found = {str(key): text for key, text, done in rows if done}
    strange = next((key for key, text in found.items() if not isinstance(text, str)), None)
    if strange is not None:
        raise ValueError(f"{_beside(file)}: the {column} of {strange} is no text; choose another")
    return found


def _done(table: Any) -> list[bool]:
    if STATUS not in table.column_names:
        return [True] * table.num_rows
    return [status == DONE for status in table[STATUS].to_pylist()]


def _table(file: ShardFile, columns: tuple[str, ...]) -> Any:
    """The named columns and those that tell the rows apart; None without the file, or where it has
    no keys."""
    data = read_whole(_beside(file))
    if data is None:
        return None
    parquet = _reader(file)
    with io.BytesIO(data) as held:
        whole = _opened(parquet, held, file)
        has = whole.schema_arrow.names
        if KEY not in has:
            return None
        return whole.read([name for name in dict.fromkeys((KEY, STATUS, *columns)) if name in has])


def _names(file: ShardFile) -> list[str]:
    found = _opened(_reader(file), io.BytesIO(read_whole(_beside(file)) or b""), file)
    names: list[str] = found.schema_arrow.names
    return names


def _opened(parquet: Any, held: io.BytesIO, file: ShardFile) -> Any:
    from pyarrow import ArrowException

    try:
        return parquet.ParquetFile(held)
    except (ArrowException, OSError) as error:
        raise ValueError(
            f"{_beside(file)}: truncated or damaged ({error}); copy it again"
        ) from error


def _reader(file: ShardFile) -> Any:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"{_beside(file)}: reading parquet needs {missing.name}: pip install "
            "'attention-trainer[parquet]'"
        ) from missing
    return parquet


def _beside(file: ShardFile) -> str:
    return f"{file.address.removesuffix('.tar')}.parquet"
