"""A file that is made once and kept in the cache, with its checksum and its place in a file beside
it, for formats that have no checksum of their own: what is cut, altered or in another one's place
is made again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from trainer.common.atomic import written_atomically
from trainer.data.identity import sha256_of_file
from trainer.data.kept import place_of


def kept_file(path: Path, make: Callable[[Path], object], say: Callable[[str], None]) -> None:
    """Has a file made where there is none, or another one than was made.

    make: writes the file to the path it is given, in an empty folder of its own, so that an
    interruption leaves nothing that could be taken for it. say: receives a line where a file was
    not what was written.
    """
    seal = path.with_suffix(".sha256")
    if path.is_file() and seal.is_file():
        if seal.read_bytes() == _sealed(path, sha256_of_file(path)):
            return
        say(f"{path}, kept from before, is damaged or was changed; it is made again")
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".making-", dir=path.parent) as place:
        made = Path(place) / path.name
        make(made)
        digest = sha256_of_file(made)
        os.replace(made, path)
    with written_atomically(seal) as part:
        part.write_bytes(_sealed(path, digest))


def _sealed(path: Path, digest: str) -> bytes:
    """What stands beside a file: its checksum and its place, see `place_of`."""
    return f"{digest} {place_of(path)}\n".encode()
