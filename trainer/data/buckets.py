"""Aspect-ratio buckets: each picture is cut to the size nearest to its own shape, and a batch is of
one size. Which bucket makes which batch is planned for all ranks at once, see `plan.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Protocol, runtime_checkable

from PIL import Image, ImageOps

from trainer.media.images import FORMATS

MAX_ASPECT = 2.0  # what is longer is cut to it
TURNED = (5, 6, 7, 8)  # EXIF orientations that lie on their side
Size = tuple[int, int]  # width, height in pixels


@runtime_checkable
class Bucketed(Protocol):
    """A dataset whose groups need not be of one size; sizes: of the samples of each group."""

    sizes: Sequence[Size]


def bucket_sizes(side: int, step: int) -> list[Size]:
    """Every size with sides that are multiples of `step`, as many pixels as a square of `side` or
    the fewer that the step allows, and an aspect ratio of at most 2.

    Raises:
        ValueError: the square is not among them.
    """
    if side % step:
        raise ValueError(
            f"buckets={step} does not divide the resolution of {side} pixels; give a divisor of it"
        )
    found = []
    for width in range(step, 2 * side + 1, step):
        height = side * side // width // step * step
        if height and max(width / height, height / width) <= MAX_ASPECT:
            found.append((width, height))
    return found


def nearest_bucket(shape: Size, among: Sequence[Size]) -> Size:
    """The size whose aspect ratio is nearest, as a factor; of two as near, the larger one."""
    aspect = log(shape[0] / shape[1])
    return min(among, key=lambda size: (abs(log(size[0] / size[1]) - aspect), -size[0] * size[1]))


def arrange(
    shapes: Sequence[Size], side: int, step: int
) -> tuple[list[int], list[range], list[Size]]:
    """The samples in an order in which those of a bucket stand together, the range of each bucket
    in that order, and its size. step 0: one bucket, the square."""
    if not step:
        return list(range(len(shapes))), [range(len(shapes))], [(side, side)]
    among = bucket_sizes(side, step)
    own = [nearest_bucket(shape, among) for shape in shapes]
    used = sorted(set(own))
    order = sorted(range(len(shapes)), key=lambda i: (own[i], i))
    groups, start = [], 0
    for size in used:
        groups.append(range(start, start + own.count(size)))
        start = groups[-1].stop
    return order, groups, used


def check_step(step: int, divisor: int) -> None:
    """Raises ValueError unless latents of `divisor` pixels fill the sides of every bucket."""
    if step % divisor:
        raise ValueError(
            f"buckets={step}: this backbone takes sides in multiples of {divisor} pixels; give "
            f"a multiple of it, as in buckets={8 * divisor}"
        )


def cover(image: Image.Image, size: Size) -> Image.Image:
    """Scales the picture until it covers `size` (Lanczos) and cuts out the centre."""
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def upright_size(path: Path) -> Size:
    """Width and height of a photo as it is seen, from its header."""
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112) in TURNED
    return (height, width) if turned else (width, height)
