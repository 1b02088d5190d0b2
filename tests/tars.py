"""Tars with members as they are given, good or bad."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path


def pack(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo, pax: bool = False) -> Path:
    form = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    with tarfile.open(path, "w", format=form) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path
