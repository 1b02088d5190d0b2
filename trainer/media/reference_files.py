"""Reference pictures beside photos: what a photo shows, told by other pictures.

    cat.ref.png  cat.ref2.png                                       of cat.jpg
    {"file_name": "cat.jpg", "text": "a cat", "reference": "more/cat.png"}    in metadata.jsonl

`reference` may be a list. Paths are beside the file that names them, and lead nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.media.images import ImageError, cover, read_image, to_tensor

if TYPE_CHECKING:
    from torch import Tensor

NAME = re.compile(r"(.+)\.ref(\d*)", re.IGNORECASE)
References = dict[Path, tuple[Path, ...]]


def references_among(paths: Iterable[Path]) -> References:
    """The reference pictures of each photo that has some, by the names of the images of one folder.

    Raises:
        ValueError: a reference picture without a photo.
    """
    images = list(paths)
    named = {path: own for path in images if (own := NAME.fullmatch(path.stem))}
    photos = {path.stem.casefold(): path for path in images if path not in named}
    found: dict[Path, list[Path]] = {}
    for path, name in sorted(named.items(), key=lambda item: int(item[1][2] or 1)):
        photo = photos.get(name[1].casefold())
        if photo is None:
            raise ValueError(
                f"{path}: a reference picture by its name, and no photo {name[1]} is beside it; "
                "add the photo, or rename the file if it is a photo itself"
            )
        found.setdefault(photo, []).append(path)
    return {photo: tuple(each) for photo, each in found.items()}


def references_in(table: Path) -> References:
    """Those that a `metadata.jsonl` names; lines that are no JSON are reported where captions are
    read.

    Raises:
        ValueError: a reference that is no file below the table's folder.
    """
    found: References = {}
    for number, line in enumerate(table.read_text(encoding="utf-8", errors="replace").split("\n")):
        row = None
        with suppress(ValueError):
            row = json.loads(line)
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            continue
        given = row.get("reference")
        names = given if isinstance(given, list) else [given] if given is not None else []
        for name in names:
            path = table.parent / str(name)
            below = path.resolve().is_relative_to(table.parent.resolve())
            if not isinstance(name, str) or not below or not path.is_file():
                raise ValueError(
                    f"{table} line {number + 1}: there is no reference picture {name!r} in "
                    f"{table.parent}; give its path from there, as in more/cat.png"
                )
        if names:
            found[table.parent / row["file_name"]] = tuple(table.parent / name for name in names)
    return found


def check_alike(photos: Iterable[Path], references: References) -> int:
    """How many reference pictures each photo has; 0 where none has one.

    Raises:
        ValueError: photos with other numbers of them.
    """
    counts = {photo: len(references.get(photo, ())) for photo in photos}
    most = max(counts.values(), default=0)
    other = next((photo for photo, count in counts.items() if count != most), None)
    if other is not None:
        raise ValueError(
            f"{other}: {counts[other]} reference pictures, and another photo has {most}; give "
            "every photo as many, as in cat.ref.png and cat.ref2.png beside cat.jpg"
        )
    return most


def reference_picture(path: Path, side: int) -> Tensor:
    """A picture scaled to cover a square and cut to it, (3, side, side) in [-1, 1].

    Raises:
        ImageError: it cannot be read.
    """
    try:
        return to_tensor(cover(read_image(path), (side, side)))
    except ImageError as error:
        raise ImageError(f"{error}; it is a reference picture") from error
