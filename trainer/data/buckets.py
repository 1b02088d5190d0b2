"""Aspect-ratio buckets: each picture is cut to the size with the nearest aspect ratio, and all
pictures of a batch have one size. `plan.py` decides which bucket makes which batch, the same on all
ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Protocol, runtime_checkable

MAX_ASPECT = 2.0  # pictures with a larger ratio are cut to this one
Size = tuple[int, int]  # width, height in pixels


@runtime_checkable
class Bucketed(Protocol):
    """A dataset whose groups may differ in size; sizes: of the samples of each group."""

    sizes: Sequence[Size]


def bucket_sizes(side: int, step: int) -> list[Size]:
    """Every size (width, height) with sides that are multiples of `step`, an aspect ratio of at
    most `MAX_ASPECT`, and the largest height with no more pixels than a square of `side`.

    Raises:
        ValueError: `step` does not divide `side`.
    """
    check_divides(step, side)
    found = []
    for width in range(step, 2 * side + 1, step):
        height = side * side // width // step * step
        if height and max(width / height, height / width) <= MAX_ASPECT:
            found.append((width, height))
    return found


def nearest_bucket(shape: Size, among: Sequence[Size]) -> Size:
    """The size with the nearest aspect ratio, by their quotient; of two as near, the larger one."""
    aspect = log(shape[0] / shape[1])
    return min(among, key=lambda size: (abs(log(size[0] / size[1]) - aspect), -size[0] * size[1]))


def arrange(
    shapes: Sequence[Size], side: int, step: int
) -> tuple[list[int], list[range], list[Size]]:
    """An order of the samples that puts each bucket's together, the range of each bucket in that
    order, and its size. step 0: one bucket, the square."""
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


def cut_size(shape: Size, side: int, step: int) -> Size:
    """The size to which a picture is cut, as `arrange` has it: of its bucket, or the square."""
    return nearest_bucket(shape, bucket_sizes(side, step)) if step else (side, side)


def check_divides(step: int, side: int) -> None:
    """Raises ValueError unless buckets of `step` pixels divide the side of a square."""
    if side % step:
        raise ValueError(
            f"data.buckets={step} does not divide the resolution of {side} pixels; give a divisor "
            "of it"
        )


def check_step(step: int, divisor: int) -> None:
    """Raises ValueError unless `step` is a multiple of `divisor`, the pixels per latent."""
    if step % divisor:
        raise ValueError(
            f"buckets={step}: this backbone takes sides in multiples of {divisor} pixels; give "
            f"a multiple of it, as in buckets={8 * divisor}"
        )
