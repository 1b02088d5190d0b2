"""BMP, TIFF and HEIC: decoded for files of such a name alone, so that no file by another name
starts one of these larger decoders."""

from __future__ import annotations

from pathlib import Path

# suffix: (what Pillow calls it, where its signature stands, the signatures)
OTHERS: dict[str, tuple[str, int, tuple[bytes, ...]]] = {
    ".bmp": ("BMP", 0, (b"BM",)),
    ".tif": ("TIFF", 0, (b"II*\0", b"MM\0*")),
    ".tiff": ("TIFF", 0, (b"II*\0", b"MM\0*")),
    ".heic": ("HEIF", 4, (b"ftyphe", b"ftypmif1", b"ftypmsf1")),
    ".heif": ("HEIF", 4, (b"ftyphe", b"ftypmif1", b"ftypmsf1")),
}
OTHER_IMAGES = frozenset(OTHERS)


def other_format(name: str | Path, head: bytes) -> str | None:
    """What Pillow calls the format of a file, where its name and its first bytes agree that it is
    one of these; None for all others.

    Raises:
        ModuleNotFoundError: the file is a HEIC and pillow-heif is not installed.
    """
    known = OTHERS.get(Path(name).suffix.lower())
    if known is None or not head[known[1] :].startswith(known[2]):
        return None
    if known[0] == "HEIF":
        _register_heif(name)
    return known[0]


def _register_heif(name: str | Path) -> None:
    try:
        from pillow_heif import register_heif_opener
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"{name}: reading HEIC needs {missing.name}: pip install 'attention-trainer[heic]'"
        ) from missing
    register_heif_opener(thumbnails=False)
