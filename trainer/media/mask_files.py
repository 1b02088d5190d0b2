"""Masks beside photos: which files are masks, of which photo, and how much of the loss each pixel
gets.

    cat_mask.png  cat-mask.png  cat.mask.png  cat-masklabel.png (OneTrainer)     of cat.jpg
    0.mask.png of 0.src.jpg (cloneofsimo's lora)

White counts in full, black not at all, grey in part, as in sd-scripts and OneTrainer. In a mask
that paints objects in colours, or numbers them from 1 on, every pixel of an object counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.media.images import ImageError, ImageRules, read_image

LAST_WORD = re.compile(r"(.+)[-_. ](?:masks?|mask[-_. ]?label)", re.IGNORECASE)
LAST_WORDS = re.compile(r"(.+)[-_. ](?:loss|train(?:ing)?)[-_. ]masks?", re.IGNORECASE)
# what other tools make of a photo and put beside it or into a folder of its own, which is no photo
# to learn
MADE = (
    r"(?:cond(?:ition(?:ing|ed)?)?(?:label)?|control(?:net)?|depth|disparity|canny|edges?|normals?|"
    r"pose|openpose|dwpose|skeleton|keypoints|landmarks|hed|mlsd|line[-_ ]?art|sketch|scribble|"
    r"soft[-_ ]?edge|seg(?:mentation)?s?|saliency|alpha|matte|trimap|cut[-_ ]?out|"
    r"(?:no|rem)[-_ ]?bg|foreground|labels?|preview|thumb(?:nail)?|\w*masks?(?:label)?)"
)
MORE = r"(?:[-_. ]?(?:maps?|images?|imgs?|\d+))*"
FOLDER = re.compile(rf"{MADE}{MORE}", re.IGNORECASE)
BESIDE = re.compile(rf"(?:\w+[-_. ])?{MADE}(?:[-_. ][a-z]+)?{MORE}", re.IGNORECASE)
GLUED = re.compile(r"(.+?)(?:masks?(?:label)?|depth|openpose|canny|alpha|matte)\d*", re.IGNORECASE)
COLOURED = 48  # a difference of channels that no compression of grey makes
FEW = 15  # up to here the values of a PNG number objects; in a JPEG they are noise of black
DARK = 24  # the brightest channel of what counts as black in a coloured mask
ALIKE = 0.01  # aspect ratios that differ by less are the same


def masks_among(paths: Iterable[Path]) -> dict[Path, Path]:
    """The mask of each photo that has one, of the images of one folder.

    Raises:
        ValueError: a mask without a photo, or a photo with two masks.
    """
    images = list(paths)
    masks = [path for path in images if _owners(path)]
    names: dict[str, list[Path]] = {}
    for path in images:
        if path not in masks:
            for name in {path.stem, path.name, re.sub(r"\.src$", "", path.stem)}:
                names.setdefault(name.casefold(), []).append(path)
    found: dict[Path, Path] = {}
    for mask in masks:
        owners = next((names[each] for each in _owners(mask) if each in names), None)
        if owners is None:
            raise ValueError(
                f"{mask}: a mask by its name, and no photo {_owners(mask)[0]} is beside it; add "
                "the photo, or rename the file if it is a photo itself"
            )
        for photo in owners:
            if photo in found:
                raise ValueError(
                    f"{photo}: {found[photo].name} and {mask.name} are both its mask; keep one"
                )
            found[photo] = mask
    return found


def images_beside(paths: Iterable[Path]) -> list[Path]:
    """Images whose names, or those of their folders, say that they are neither photos nor masks,
    but made from a photo that is there: cat-condlabel.png, cat_depth_map.png, cat(mask).png,
    catmask.png and mask_cat.png beside cat.jpg, masks/cat.png and conditioning/cat.png with any
    cat.jpg."""
    images = [path for path in paths if not _owners(path)]
    places: dict[str, set[Path]] = {}
    for path in images:
        places.setdefault(path.stem.casefold(), set()).add(path.parent)
    return [path for path in images if _is_made(path, places)]


def _is_made(path: Path, places: Mapping[str, set[Path]]) -> bool:
    """Whether a photo is there that an image is made from. places: the folders of each stem."""
    stem = path.stem.casefold()
    for gap in re.finditer(r"[-_. (\[]", stem):
        before, behind = stem[: gap.start()], stem[gap.end() :].strip("()[]")
        if path.parent in places.get(before, ()) and BESIDE.fullmatch(behind):
            return True
        if path.parent in places.get(behind, ()) and FOLDER.fullmatch(before):
            return True
    glued = GLUED.fullmatch(stem)
    if glued and path.parent in places.get(glued[1], ()):
        return True
    elsewhere = places[stem] - {path.parent}
    return bool(FOLDER.fullmatch(path.parent.name)) and any(
        not FOLDER.fullmatch(folder.name) for folder in elsewhere
    )


def read_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """The mask of a photo of `size`, width and height: 8-bit grey in that size.

    Raises:
        ImageError: it cannot be read, has another shape than the photo, or is all black.
    """
    image = read_image(path, ImageRules(background=(0, 0, 0)))
    wide, tall = image.size
    if abs(wide / tall * size[1] / size[0] - 1) > ALIKE:
        raise ImageError(
            f"{path}: {wide}x{tall} pixels, and its photo has {size[0]}x{size[1]}; a mask has the "
            "shape of its photo"
        )
    mask = weights_of(image, str(path), lossless=path.suffix.lower() == ".png")
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BOX)


def weights_of(image: Image.Image, name: str, *, lossless: bool) -> Image.Image:
    """How much each pixel counts, 8-bit grey, of a mask in RGB. lossless: whether its file keeps
    pixels exactly, so that it may number objects; name: of the file, for messages.

    Raises:
        ImageError: it is all black.
    """
    pixels = np.asarray(image)
    bright = pixels.max(2)
    coloured = int((bright - pixels.min(2)).max()) > COLOURED
    numbered = lossless and 0 < bright.max() <= FEW
    floor = DARK if coloured else 0 if numbered else None
    grey = bright if floor is None else np.where(bright > floor, 255, 0).astype(np.uint8)
    if grey.max() <= FEW:
        raise ImageError(
            f"{name}: all black, so nothing of its photo would be learned; paint white what counts"
        )
    return Image.fromarray(grey)


def _owners(path: Path) -> list[str]:
    """What the photo of a mask may be called, without its suffix or with it, in lower case; empty
    for a file that is no mask by its name."""
    found = (pattern.fullmatch(path.stem) for pattern in (LAST_WORD, LAST_WORDS))
    return [name[1].casefold() for name in found if name]
