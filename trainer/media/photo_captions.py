"""The captions of photos, as people have them: a text file beside each, one table for all, or the
name of the folder.

    a.txt, a.caption         of a.jpg
    metadata.jsonl           a line {"file_name": "a.jpg", "text": "a dog"} for each photo (Hugging
                             Face's imagefolder); `caption` in place of `text`, or a list of texts
    10_dog/a.jpg             "dog" (kohya's sd-scripts), where the photo has none of these
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.media.images import ImageError
from trainer.media.photo_listing import METADATA, Listing
from trainer.media.read_caption import CAPTION_FILES, decode_caption

CaptionKind = Literal["txt", "caption", "metadata", "folder"]
TEXTS = ("text", "caption")  # the columns of a table that hold a caption
NAMES = {"txt": ".txt", "caption": ".caption", "metadata": METADATA, "folder": "folder names"}


@dataclass(frozen=True)
class CaptionRules:
    """Which captions are read. lines: each line of a text file is a caption of its own; kind: the
    only ones to read, None for any; subjects: whether names of folders are captions."""

    lines: bool = False
    kind: CaptionKind | None = None
    subjects: bool = True


ANY = CaptionRules()


@dataclass(frozen=True)
class Captioned:
    """The captions of a photo, at least one, where they stand, and how many lines its file has."""

    texts: tuple[str, ...]
    kind: CaptionKind
    where: str
    lines: int = 1


class Captions:
    """The captions of the photos of a listing, each read once; raises ImageError for a table that
    is damaged."""

    def __init__(self, listing: Listing, rules: CaptionRules = ANY) -> None:
        self.listing, self.rules = listing, rules
        self._known: dict[Path, Captioned | None] = {}
        self._rows: dict[Path, Captioned] = {}
        for table in listing.tables if rules.kind in (None, "metadata") else ():
            self._rows |= _read_table(table, listing)

    def of(self, photo: Path) -> Captioned | None:
        """The captions of a photo; None without any.

        Raises:
            ImageError: a file is not UTF-8, or two places give it different captions.
        """
        if photo not in self._known:
            self._known[photo] = self._read(photo)
        return self._known[photo]

    def _read(self, photo: Path) -> Captioned | None:
        found = [*self._files(photo), *filter(None, [self._rows.get(photo)])]
        for other in found[1:]:
            if other.texts != found[0].texts:
                kinds = " or ".join(f"data.caption_from={each.kind}" for each in (found[0], other))
                raise ImageError(
                    f"{photo}: {found[0].where} and {other.where} give it different captions; keep "
                    f"one, or choose by {kinds}"
                )
        if found:
            return found[0]
        subject = self.listing.subject(photo)
        if subject is None or not self.rules.subjects or self.rules.kind not in (None, "folder"):
            return None
        return Captioned((subject,), "folder", where=f"the folder {photo.parent.name}")

    def has(self, photo: Path) -> bool:
        """Whether there is a caption, readable or not."""
        try:
            return self.of(photo) is not None
        except ImageError:
            return True  # reading the photo reports what is wrong with it

    def _files(self, photo: Path) -> list[Captioned]:
        found: dict[CaptionKind, Captioned] = {}
        for suffix in CAPTION_FILES:
            path = photo.with_suffix(suffix)
            kind: CaptionKind = "txt" if suffix.lower() == ".txt" else "caption"
            if kind in found or self.rules.kind not in (None, kind) or not path.is_file():
                continue
            text = decode_caption(path.read_bytes(), path)
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            texts = tuple(lines) if self.rules.lines and lines else (text,)
            found[kind] = Captioned(texts, kind, where=str(path), lines=len(lines))
        return list(found.values())


def _read_table(table: Path, listing: Listing) -> dict[Path, Captioned]:
    """The captions that a `metadata.jsonl` gives to photos."""
    photos, found = set(listing.photos), {}
    text = decode_caption(table.read_bytes(), table)
    for number, line in enumerate(text.split("\n"), 1):  # a text may hold other line ends
        if not line.strip():
            continue
        where = f"{table} line {number}"
        row = _row(line, where)
        photo = table.parent / row["file_name"]
        if photo not in photos:
            raise ImageError(f"{where}: {_absent(photo, table, listing)}")
        if photo in found:
            raise ImageError(f"{where}: {row['file_name']} is named a second time; keep one line")
        texts = _texts(row, where)
        found[photo] = Captioned(texts, "metadata", where=where, lines=len(texts))
    return found


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ImageError(f"{where}: not JSON ({error}); each line is one JSON object") from None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise ImageError(
            f'{where}: names no file; a line looks like {{"file_name": "a.jpg", "text": "a dog"}}'
        )
    return row


def _texts(row: dict[str, Any], where: str) -> tuple[str, ...]:
    given = {key: row[key] for key in TEXTS if row.get(key) is not None}
    if len(given) > 1 and given["text"] != given["caption"]:
        raise ImageError(f"{where}: text and caption differ; keep one of them")
    value = next(iter(given.values()), None)
    texts = value if isinstance(value, list) else [value]
    found = tuple(text.strip() for text in texts if isinstance(text, str))
    if not found or len(found) != len(texts):
        raise ImageError(
            f"{where}: {row['file_name']} has no caption; give text (or caption), a text or a list "
            "of texts"
        )
    return found


def _absent(photo: Path, table: Path, listing: Listing) -> str:
    name = photo.relative_to(table.parent).as_posix()
    if photo in listing.masks.values():
        return f"{name} is a mask by its name, and no photo"
    if photo.is_file():
        return f"{name} is not read as a photo; data.recursive=true reads subfolders"
    return f"there is no photo {name}; add it, or remove the line"
