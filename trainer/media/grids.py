"""Grids of pictures with labels, and attention maps drawn over images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from trainer.media.images import to_pil

LABEL = 14
SIDE = 96  # pixels of a cell, at least


def grid(
    rows: Sequence[tuple[str, Tensor | Sequence[Image.Image]]],
    titles: Sequence[str] = (),
    side: int = SIDE,
) -> Image.Image:
    """Rows of (label, pictures (n, 3, H, W) in [-1, 1] or images) as one image, with titles above
    columns.

    Each picture is in the middle of a square of `side` pixels, as large as fits. A label wider than
    that is broken into several lines. If `side` is even, the width is even, which video formats
    need.
    """
    columns = max(len(pictures) for _, pictures in rows)
    labels = [wrap(label, side) for label, _ in rows]
    left = 8 + max(_width(line) for label in labels for line in label)
    left += left % 2
    lines = [wrap(title, side) for title in titles]
    top = LABEL * max((len(line) for line in lines), default=0) + (4 if lines else 0)
    sheet = Image.new("RGB", (left + columns * (side + 2), top + len(rows) * (side + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, line in enumerate(lines):
        for number, words in enumerate(line):
            pen.text((left + column * (side + 2), number * LABEL), words, fill="black")
    for row, (label, (_, pictures)) in enumerate(zip(labels, rows, strict=True)):
        y = top + row * (side + 2)
        for number, words in enumerate(label):
            middle = y + side // 2 - 6 + LABEL * number - LABEL * (len(label) - 1) // 2
            pen.text((2, middle), words, fill="black")
        for column, picture in enumerate(pictures):
            own = picture if isinstance(picture, Image.Image) else to_pil(picture)
            cell = _scaled(own, side)
            x = left + column * (side + 2) + (side - cell.width) // 2
            sheet.paste(cell, (x, y + (side - cell.height) // 2))
    return sheet


def cell_side(pictures: Tensor, most: int) -> int:
    """The side of cells that show pictures (n, 3, H, W) in their own size, if that is at least
    `SIDE` and at most `most` pixels."""
    return max(SIDE, min(most, max(pictures.shape[-2:])))


def overlay_maps(pictures: Tensor, maps: Tensor) -> Tensor:
    """Attention maps (n, h, w) drawn as red heat over grey pictures (n, 3, H, W) in [-1, 1]. Each
    map is scaled from its least value to its largest."""
    heat = torch.nn.functional.interpolate(maps[:, None], size=pictures.shape[-2:], mode="bilinear")
    low, high = heat.amin((2, 3), keepdim=True), heat.amax((2, 3), keepdim=True)
    heat = (heat - low) / (high - low).clamp(min=1e-12)
    colour = torch.tensor([1.0, -0.2, -0.9])[None, :, None, None]
    gray = pictures.mean(1, keepdim=True).expand_as(pictures) * 0.6
    return (gray * (1 - heat) + colour * heat).clamp(-1, 1)


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    longer = max(picture.size)
    whole = side % longer == 0 or longer < side
    width, height = (max(1, round(own * side / longer)) for own in picture.size)
    return picture.resize(
        (width, height), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
    )


def _width(text: str) -> int:
    return int(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(text))


def wrap(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _width(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """The images below each other, on white."""
    size = max(image.width for image in images), sum(image.height for image in images)
    sheet, top = Image.new("RGB", size, "white"), 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    return sheet
