"""What wandb has stored of a run offline: records in blocks of 32 KiB, as LevelDB writes its log,
after a header of 7 bytes."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
WHOLE, LAST = 1, 4  # kinds of a piece that completes a record


def stored_in(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a run's history and its config, from its folder `offline-run-...`."""
    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    for record in _finished(run):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append(_values(record.history.item))
        elif kind in ("run", "config"):
            config |= _values((record.run.config if kind == "run" else record.config).update)
    return rows, config


def _finished(run: Path) -> list[Any]:
    """The records once the last is there: `wandb.finish` may return before its service has written
    the file."""
    (file,) = run.glob("*.wandb")
    for _ in range(100):
        records = list(_records(file.read_bytes()))
        if records and records[-1].WhichOneof("record_type") in ("exit", "footer"):
            return records
        time.sleep(0.1)
    raise TimeoutError(f"{file} does not end with the end of a run")


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    assert data[:4] == b":W&B"
    at, piece = HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        at += HEADER
        piece += data[at : at + size]
        at += size
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(piece)
            piece = b""
            yield record
