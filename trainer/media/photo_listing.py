"""What lies in a folder of photos: the photos in order, the masks beside them, how often each is
repeated, and what is not read.

    10_dog/a.jpg     ten times in an epoch, and "dog" where nothing else says what it shows

is the layout of kohya's sd-scripts. Such subfolders are read where the folder itself holds no
photo; other subfolders are read on request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from trainer.common.left_by_systems import left_by_system
from trainer.media.mask_files import images_beside, masks_among
from trainer.media.other_formats import OTHER_IMAGES
from trainer.media.read_caption import CAPTION_FILES
from trainer.media.reference_files import References, references_among, references_in

WEB_IMAGES = frozenset((".jpg", ".jpeg", ".png", ".webp"))
READABLE_IMAGES = WEB_IMAGES | OTHER_IMAGES
# These are listed too, so that reading reports an error: a photo must not go unnoticed.
ANIMATED_OR_WEB = (".gif", ".apng", ".avif", ".jxl", ".svg", ".ico", ".jfif")
EDITED_OR_RAW = (".jp2", ".mpo", ".psd", ".dng", ".cr2", ".nef", ".arw")
LISTED_IMAGES = READABLE_IMAGES.union(ANIMATED_OR_WEB, EDITED_OR_RAW)
METADATA = "metadata.jsonl"
REPEATED = re.compile(r"([1-9][0-9]{0,2})_(.+)")  # more digits are a year or a date
NAMED = 3  # files that a sentence names


@dataclass(frozen=True)
class Listing:
    """The photos of a folder in natural order, 2 before 10, the mask of each that has one, and the
    files and subfolders that are not read. tables: files of captions, `metadata.jsonl`; references:
    the reference pictures of photos that have some."""

    folder: Path
    photos: tuple[Path, ...]
    masks: dict[Path, Path]
    tables: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()
    references: References = field(default_factory=dict)

    def stored(self) -> int:
        """Bytes of the photos and their masks; a file that is missing counts nothing."""
        more = (path for own in self.references.values() for path in own)
        paths = (*self.photos, *self.masks.values(), *more)
        return sum(path.stat().st_size for path in paths if path.is_file())

    def name(self, path: Path) -> str:
        """A photo's path inside the folder, as `10_dog/a.jpg`."""
        return path.relative_to(self.folder).as_posix()

    def repeats(self, path: Path) -> int:
        """How often a photo is in an epoch, by the name of its subfolder."""
        found = self._repeated(path)
        return int(found[1]) if found else 1

    def subject(self, path: Path) -> str | None:
        """What a photo shows by the name of its subfolder; None where that says nothing."""
        found = self._repeated(path)
        return found[2] if found else None

    def _repeated(self, path: Path) -> re.Match[str] | None:
        parts = path.relative_to(self.folder).parts[:-1]
        return next(filter(None, map(REPEATED.fullmatch, reversed(parts))), None)


def list_photos(folder: str | Path, recursive: bool = False) -> Listing:
    """Lists a folder of photos. recursive: its subfolders too.

    Files of image formats that cannot be read are listed as photos, so that reading them reports an
    error. Hidden files, and those that systems leave, are passed over.

    Raises:
        ValueError: the folder is missing, is a file, or holds no photo; see also `masks_among` and
        `references_among`.
    """
    folder = Path(folder)
    expected = f"expected a folder with images ({', '.join(sorted(READABLE_IMAGES))})"
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder; {expected}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: this is a file; {expected}, give the folder that holds it")
    found = _tree(folder, recursive)
    images = [path for path in found if _is_image(path)]
    if not images and not recursive:
        own = [each for each in found if each.is_dir() and REPEATED.fullmatch(each.name)]
        inside = [path for each in own for path in _tree(each, False)]
        images = [path for path in inside if _is_image(path)]
        found = [path for path in found if path not in own] + inside
    if not images:
        below = "" if recursive else ", subfolders are not read without data.recursive=true"
        raise ValueError(f"{folder}: no image in this folder; {expected}{below}")
    return _listing(folder, found, images)


def natural_order(path: Path) -> tuple[list[str | int], str]:
    """A key to sort file names by number, 2 before 10."""
    parts = re.split(r"([0-9]+)", path.name.casefold())  # odd parts are numbers
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def unread(listing: Listing) -> list[str]:
    """A sentence for what a user may not expect of a folder: files and subfolders that are not
    read, and images that are trained on though their names say that they are made from photos."""
    found = []
    if listing.others:
        found.append(
            f"{listing.folder}: not read: {_few(listing, listing.others)}; captions are read from "
            ".txt and .caption files of the photos' names and from metadata.jsonl, masks from "
            "files like x_mask.png, and subfolders with data.recursive=true"
        )
    if beside := images_beside(listing.photos):
        found.append(
            f"{listing.folder}: trained on as photos: {_few(listing, beside)}; move them away if "
            "they are something else (a mask is called x_mask.png)"
        )
    return found


def _listing(folder: Path, found: list[Path], images: list[Path]) -> Listing:
    images = sorted(images, key=lambda path: _order(folder, path))
    masks: dict[Path, Path] = {}
    for paths in _by_folder(images):
        masks |= masks_among(paths)
    tables = tuple(path for path in found if path.name == METADATA and path.is_file())
    references = {photo: own for each in tables for photo, own in references_in(each).items()}
    for paths in _by_folder(images):
        references |= references_among(paths)
    shown = {*masks.values(), *(path for own in references.values() for path in own)}
    photos = tuple(path for path in images if path not in shown)
    captions = {path.with_suffix(suffix) for path in photos for suffix in CAPTION_FILES}
    known = {*images, *captions, *tables}
    others = [path for path in found if path not in known]
    return Listing(
        folder,
        photos,
        masks,
        tables=tables,
        others=tuple(sorted(others, key=lambda path: _order(folder, path))),
        references=references,
    )


def _tree(folder: Path, recursive: bool) -> list[Path]:
    """The files in a folder and, if `recursive`, in those below it; else its subfolders as well."""
    found: list[Path] = []
    for path in folder.iterdir():
        if left_by_system(path.name):
            continue
        if recursive and path.is_dir():
            # a link to a folder above would be read without end
            if not folder.resolve().is_relative_to(path.resolve()):
                found += _tree(path, True)
        else:
            found.append(path)
    return found


def _is_image(path: Path) -> bool:
    # not `is_file`: a broken link with the name of an image must be reported as missing
    return path.suffix.lower() in LISTED_IMAGES and not path.is_dir()


def _by_folder(paths: Iterable[Path]) -> list[list[Path]]:
    found: dict[Path, list[Path]] = {}
    for path in paths:
        found.setdefault(path.parent, []).append(path)
    return list(found.values())


def _order(folder: Path, path: Path) -> list[tuple[list[str | int], str]]:
    return [natural_order(Path(part)) for part in path.relative_to(folder).parts]


def _few(listing: Listing, paths: Iterable[Path]) -> str:
    paths = list(paths)
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    names = (f"{listing.name(path)}{'/' if path.is_dir() else ''}" for path in paths[:NAMED])
    return f"{', '.join(names)}{more}"
