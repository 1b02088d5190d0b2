"""Files and folders that systems, archivers and editors leave among a user's own, and that nobody
means by a folder's name: they are passed over wherever files are listed."""

from __future__ import annotations

import re
from pathlib import Path

# a name between two slashes: hidden ones (._0.jpg and .DS_Store of a Mac), what Windows, file
# servers (@eaDir of Synology) and file systems keep, streams and extended headers that were
# unpacked as files, and what editors save
LEFT = re.compile(
    r"\.(?!\.?$).*|__MACOSX|PaxHeaders?(?:\.\d+)?|Icon\r|Network Trash Folder|Temporary Items"
    r"|(?:eh)?thumbs(?:_vista)?\.db(?::.*)?|desktop\.ini|\$RECYCLE\.BIN|RECYCLER"
    r"|System Volume Information|.*:Zone\.Identifier(?::\$DATA)?"
    r"|@eaDir|@Recycle|#recycle|.*@Syno(?:EAStream|Resource)|lost\+found|~\$.*|.+~",
    re.IGNORECASE | re.DOTALL,
)


def left_by_system(name: str) -> bool:
    """Whether a path with slashes, or a plain name, is such a file or lies in such a folder."""
    return any(LEFT.fullmatch(part) for part in name.split("/"))


def own_files(folder: Path, *suffixes: str) -> list[Path]:
    """What lies in a folder with one of these suffixes, in order; none where there is no folder."""
    found = (path for path in folder.glob("*") if path.suffix in suffixes)
    return sorted(path for path in found if not left_by_system(path.name))
