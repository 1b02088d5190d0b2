"""Captions: a text file beside a video or a folder of frames, and the text of such a file."""

from __future__ import annotations

from pathlib import Path

from trainer.media.images import ImageError

CAPTION_FILES = (".txt", ".TXT", ".caption", ".CAPTION")


def read_caption(path: str | Path) -> str | None:
    """The caption beside a video or a folder of frames: `cat.txt` or `cat.caption` for `cat.mp4`
    and for `cat/`, UTF-8 with or without BOM.

    Returns the text without surrounding white space, or None if there is no file.

    Raises:
        ImageError: the text is not UTF-8; names the file and the offset of the first wrong byte.
            Or there are two files that differ.
    """
    path = Path(path)
    stem = path.name if path.is_dir() else path.stem
    found = [
        (file, decode_caption(file.read_bytes(), file))
        for file in (path.with_name(f"{stem}{suffix}") for suffix in CAPTION_FILES)
        if file.is_file()
    ]
    for file, text in found[1:]:
        if text != found[0][1]:
            raise ImageError(f"{path}: {found[0][0].name} and {file.name} differ; keep one")
    return found[0][1] if found else None


def decode_caption(data: bytes, name: str | Path) -> str:
    """The text of a caption file, see `read_caption`; `name` is the file's name in errors."""
    try:
        # not "utf-8-sig", which does not count the BOM in the offset of an error
        return data.decode("utf-8").removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        where = f"{name}: not UTF-8 at byte {error.start}"
        raise ImageError(f"{where}; save it as UTF-8") from error
