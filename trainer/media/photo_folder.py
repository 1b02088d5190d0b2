"""Folders of photos: which files they list, and the caption beside each photo."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from trainer.media.images import ImageError, read_image, resize_cover
from trainer.media.mask_files import images_beside, masks_among, read_mask
from trainer.media.read_caption import read_caption

READABLE_IMAGES = frozenset((".jpg", ".jpeg", ".png", ".webp"))
# These are listed too, so that reading reports an error: a photo must not go unnoticed.
ANIMATED_OR_WEB = (".gif", ".apng", ".heic", ".heif", ".avif", ".jxl", ".svg", ".ico", ".jfif")
EDITED_OR_RAW = (".bmp", ".tif", ".tiff", ".jp2", ".mpo", ".psd", ".dng", ".cr2", ".nef", ".arw")
LEFT_BY_SYSTEMS = frozenset(("Thumbs.db", "desktop.ini", "Icon\r", "__MACOSX"))
LISTED_IMAGES = READABLE_IMAGES.union(ANIMATED_OR_WEB, EDITED_OR_RAW)


@dataclass(frozen=True)
class Photo:
    """One photo of a folder: RGB `image`; the text of its caption file, None without one; and its
    mask, 8-bit grey of the same size, None without one."""

    path: Path
    image: Image.Image
    caption: str | None
    mask: Image.Image | None = None


def list_images(folder: str | Path) -> list[Path]:
    """The photos of a folder, not of its subfolders, in natural order (2 before 10).

    Files of image formats that cannot be read (GIF, HEIC, ...) are listed too, so that reading
    them reports an error. Hidden files, captions, masks and other files are not listed.

    Raises:
        ValueError: the folder is missing, is a file, or holds no photo; see also `masks_among`.
    """
    images = _images_of(folder)
    masks = set(masks_among(images).values())
    return [path for path in images if path not in masks]


def masks_of(folder: str | Path) -> dict[Path, Path]:
    """The mask of each photo of a folder that has one; raises ValueError as `list_images`."""
    return masks_among(_images_of(folder))


def unread_files(folder: str | Path) -> list[str]:
    """A sentence for what a user may not expect of a folder: files and subfolders that are not
    read, and images that are trained on though their names say that they are made from photos."""
    images = _images_of(folder)
    photos = list_images(folder)
    captions = {path.with_suffix(suffix) for path in photos for suffix in (".txt", ".TXT")}
    known = {*images, *captions}
    others = [
        path
        for path in sorted(Path(folder).iterdir(), key=natural_order)
        if path not in known and not path.name.startswith(".") and path.name not in LEFT_BY_SYSTEMS
    ]
    found = []
    if others:
        found.append(
            f"{folder}: not read: {_few(others)}; captions are read from .txt files of the "
            "photos' names, masks from files like x_mask.png, and subfolders not at all"
        )
    if beside := images_beside(images):
        found.append(
            f"{folder}: trained on as photos: {_few(beside)}; move them away if they are something "
            "else (a mask is called x_mask.png)"
        )
    return found


def _few(paths: list[Path]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    names = (f"{path.name}/" if path.is_dir() else path.name for path in paths[:3])
    return f"{', '.join(names)}{more}"


def _images_of(folder: str | Path) -> list[Path]:
    folder = Path(folder)
    expected = f"expected a folder with images ({', '.join(sorted(READABLE_IMAGES))})"
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder; {expected}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: this is a file; {expected}, give the folder that holds it")
    paths = [path for path in folder.iterdir() if _is_listed(path)]
    if not paths:
        raise ValueError(f"{folder}: no image in this folder; {expected}, subfolders are not read")
    return sorted(paths, key=natural_order)


def read_folder(
    folder: str | Path,
    on_bad: Literal["raise", "skip"] = "raise",
    size: int | None = None,
) -> tuple[list[Photo], list[tuple[Path, str]]]:
    """Reads all images of a folder with their captions, in natural order.

    Args:
        on_bad: "raise" reports all bad images and captions in one error; "skip" skips them.
        size: cut each image by `resize_cover` while reading, so that large photos fit in memory.

    Returns the photos, and `(path, reason)` for each file skipped.

    Raises:
        ImageError: a bad file with "raise", or only bad files with "skip".
        ValueError: see `list_images`; `on_bad` is neither "raise" nor "skip".
    """
    if on_bad not in ("raise", "skip"):
        raise ValueError(f"on_bad={on_bad!r}: choose 'raise' or 'skip'")
    photos: list[Photo] = []
    skipped: list[tuple[Path, str]] = []
    masks = masks_of(folder)
    for path in list_images(folder):
        try:
            image = read_image(path)
            caption = read_caption(path)
            mask = read_mask(masks[path], image.size) if path in masks else None
        except ImageError as error:
            skipped.append((path, str(error)))
            continue
        if size is not None:
            image, mask = resize_cover(image, size), mask and resize_cover(mask, size)
        photos.append(Photo(path, image, caption, mask=mask))
    if skipped and (on_bad == "raise" or not photos):
        reasons = "\n".join(reason for _, reason in skipped)
        of = len(photos) + len(skipped)
        raise ImageError(f"{folder}: {len(skipped)} of {of} images cannot be used:\n{reasons}")
    return photos, skipped


def _is_listed(path: Path) -> bool:
    hidden = path.name.startswith(".")
    # not `is_file`: a broken link with the name of an image must be reported as missing
    return not hidden and path.suffix.lower() in LISTED_IMAGES and not path.is_dir()


def natural_order(path: Path) -> tuple[list[str | int], str]:
    """A key to sort file names by number, 2 before 10."""
    parts = re.split(r"([0-9]+)", path.name.casefold())  # odd parts are numbers
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name
