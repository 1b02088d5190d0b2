"""A contact sheet: small pictures in rows, what each row shows above it and a name under each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from trainer.media.grids import LABEL, wrap

SIDE, GAP, MOST = 192, 4, 8  # pixels of a picture's longer side and around it; pictures in a row


@dataclass(frozen=True)
class Strip:
    """Pictures with one title, and a name for each."""

    title: str
    pictures: Sequence[Image.Image]
    names: Sequence[str]


def thumbnail(picture: Image.Image) -> Image.Image:
    """The picture at the size of a sheet, its shape kept; a small one is not enlarged."""
    scale = min(1.0, SIDE / max(picture.size))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def contact_sheet(strips: Sequence[Strip]) -> Image.Image:
    """The sheet of all strips; a long one is broken after `MOST` pictures."""
    every = [picture for strip in strips for picture in strip.pictures]
    cell = tuple(max(picture.size[axis] for picture in every) + GAP for axis in (0, 1))
    columns = min(MOST, max(len(strip.pictures) for strip in strips))
    width = max(columns * cell[0], SIDE) + GAP
    titles = [wrap(strip.title, width - 2 * GAP) for strip in strips]
    lines = [-(-len(strip.pictures) // columns) for strip in strips]
    high = cell[1] + LABEL
    height = sum(LABEL * len(t) + GAP + n * high for t, n in zip(titles, lines, strict=True))
    sheet = Image.new("RGB", (width, height + GAP), "white")
    pen, top = ImageDraw.Draw(sheet), GAP
    for strip, title in zip(strips, titles, strict=True):
        for line in title:
            pen.text((GAP, top), line, fill="black")
            top += LABEL
        for number, (picture, name) in enumerate(zip(strip.pictures, strip.names, strict=True)):
            row, column = divmod(number, columns)
            left, upper = GAP + column * cell[0], top + row * high
            sheet.paste(picture, (left, upper))
            pen.text((left, upper + cell[1] - GAP), name, fill="black")
        top += -(-len(strip.pictures) // columns) * high + GAP
    return sheet
