"""Files and folders that are written completely or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def beside(path: Path) -> Path:
    """A hidden name in the same folder, with the same ending, that no other writer has: a number of
    a process is not enough where machines share a disk."""
    return path.with_name(f".{path.stem[:100]}.{uuid.uuid4().hex}{path.suffix}")


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A temporary path to write a file to, which replaces `path` when the block ends without an
    error; until then the earlier file stays."""
    part = beside(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
