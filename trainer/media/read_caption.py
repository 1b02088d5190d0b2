"""Captions: a text file beside a picture or a video."""

from __future__ import annotations

from pathlib import Path

from trainer.media.images import ImageError


def read_caption(path: str | Path) -> str | None:
    """The caption beside an image or video: `cat.txt` for `cat.jpg`, UTF-8 with or without BOM.

    Returns the text without surrounding white space, or None if there is no file.

    Raises:
        ImageError: the text is not UTF-8; names the file and the offset of the first wrong byte.
    """
    candidates = [Path(path).with_suffix(suffix) for suffix in (".txt", ".TXT")]
    caption_path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if caption_path is None:
        return None
    return decode_caption(caption_path.read_bytes(), caption_path)


def decode_caption(data: bytes, name: str | Path) -> str:
    """The text of a caption file, see `read_caption`; `name` is the file's name in errors."""
    try:
        # not "utf-8-sig", which does not count the BOM in the offset of an error
        return data.decode("utf-8").removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        where = f"{name}: not UTF-8 at byte {error.start}"
        raise ImageError(f"{where}; save it as UTF-8") from error
