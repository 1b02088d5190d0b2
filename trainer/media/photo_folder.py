"""Folders of photos, read: each photo with its captions and its mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from trainer.media.images import ImageError, cover, read_image, resize_cover, upright_size
from trainer.media.mask_files import read_mask
from trainer.media.photo_captions import Captions
from trainer.media.photo_listing import list_photos


@dataclass(frozen=True)
class Photo:
    """One photo of a folder: RGB `image`; its captions, none where nothing gives one; and its mask,
    8-bit grey of the same size, None without one."""

    path: Path
    image: Image.Image
    captions: tuple[str, ...] = ()
    mask: Image.Image | None = None


def list_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """The photos of a folder, see `list_photos`."""
    return list(list_photos(folder, recursive).photos)


def read_folder(
    folder: str | Path | Captions,
    on_bad: Literal["raise", "skip"] = "raise",
    size: int | None = None,
    *,
    opener: Callable[[Path], Image.Image] = read_image,
) -> tuple[list[Photo], list[tuple[Path, str]]]:
    """Reads all photos of a folder with their captions, in natural order.

    folder: its path, or the captions of its photos, which are then not read again. on_bad: "raise"
    reports all bad images and captions in one error; "skip" skips them. size: cut each image by
    `resize_cover` while reading, so that large photos fit in memory. opener: reads a photo, as
    `read_image` or from a cache.

    Returns the photos, and `(path, reason)` for each file skipped.

    Raises:
        ImageError: a bad file with "raise", or only bad files with "skip".
        ValueError: see `list_photos`; `on_bad` is neither "raise" nor "skip".
    """
    if on_bad not in ("raise", "skip"):
        raise ValueError(f"on_bad={on_bad!r}: choose 'raise' or 'skip'")
    captions = folder if isinstance(folder, Captions) else Captions(list_photos(folder))
    listing = captions.listing
    photos: list[Photo] = []
    skipped: list[tuple[Path, str]] = []
    for path in listing.photos:
        try:
            image, found = opener(path), captions.of(path)
            mask = _mask(path, listing.masks.get(path), image.size)
        except ImageError as error:
            skipped.append((path, str(error)))
            continue
        if size is not None:
            image, mask = resize_cover(image, size), mask and resize_cover(mask, size)
        photos.append(Photo(path, image, found.texts if found else (), mask=mask))
    if skipped and (on_bad == "raise" or not photos):
        raise _unusable(listing.folder, skipped, len(photos) + len(skipped))
    return photos, skipped


def _mask(photo: Path, path: Path | None, size: tuple[int, int]) -> Image.Image | None:
    """The mask of a photo, in the size in which the photo was opened."""
    mask = None if path is None else read_mask(path, upright_size(photo))
    return cover(mask, size) if mask is not None and mask.size != size else mask


def _unusable(folder: Path, skipped: list[tuple[Path, str]], total: int) -> ImageError:
    reasons = "\n".join(reason for _, reason in skipped)
    return ImageError(f"{folder}: {len(skipped)} of {total} images cannot be used:\n{reasons}")
