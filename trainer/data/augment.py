"""Resize augmentation of Custom Diffusion: a concept seen small, complete and close, with a caption
that says so.

    scale ~ U[size/3, size] with probability 2/3, else U[1.2 size, 1.4 size)
    scale <  0.6 size: pasted at a random position on grey, "very small ...", masked loss
    scale <= size:     the complete photo at full size, caption unchanged
    scale >  size:     a random crop, "close up ..."

Kumari et al., Multi-Concept Customization of Text-to-Image Diffusion, CVPR 2023, arXiv:2212.04488.
Constants read in adobe-research/custom-diffusion at 7c19c9a, `src/diffusers_data_pipeline.py` and
`src/finetune_data.py`, which agree. The later script of diffusers differs: probability 0.66, and
scales from 0.6 to 1 are pasted on grey too. The departures from the official code: a photo that
is not square is cut to its centre, not squeezed; odd scales are kept (the official code rounds
them up because it positions by centre); the prefix replaces a leading article, so that "a photo of
a cat" becomes "very small photo of a cat"; resampling is Lanczos and not bilinear.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

from PIL import Image

from trainer.data.crops import central, covered, whole
from trainer.data.loss_mask import mask_cells
from trainer.media.images import resize_cover, to_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.data.buckets import Size
    from trainer.data.crops import Crop

SMALL_PROBABILITY = 2 / 3
FAR_BELOW = 0.6
CLOSE_RANGE = (1.2, 1.4)
FAR_PREFIXES = ("a far away ", "very small ")
CLOSE_PREFIXES = ("zoomed in ", "close up ")


class Uniform(Protocol):
    """A source of floats in [0, 1), such as `random.Random` or `numpy.random.Generator`."""

    def random(self) -> float: ...


def resize_augment(
    image: Image.Image,
    caption: str,
    *,
    size: int,
    mask_divisor: int,
    rng: Uniform,
    hflip: bool = False,
    painted: Image.Image | None = None,
    shape: Size | None = None,
) -> tuple[Tensor, str, Tensor, Crop]:
    """One random augmented view of a photo, its caption, the mask of its real pixels, and which
    part of the photo it shows.

    The masked loss of a sample is `(loss * mask).sum() / mask.sum()`; the mask is never empty. A
    view in which nothing of a painted mask is left gives way to the complete photo.

    Args:
        image: RGB photo of any size.
        caption: its caption.
        size: side of the result in pixels, a multiple of `mask_divisor` and at least 6 times it.
        mask_divisor: pixels per mask cell: the downsampling factor of the VAE (8 for SD 1.5).
        rng: the only source of randomness; the same state gives the same result.
        hflip: mirror with probability 1/2. Captions that say left or right become wrong.
        painted: the photo's own mask in its size, 8-bit grey, whose centre is not all black.
        shape: width and height of the photo before its centre was cut out, None for those of image.

    Returns:
        Image float32 (3, size, size) in [-1, 1], 0 outside the photo; caption; mask float32
        (1, size // mask_divisor, size // mask_divisor) of 0 and 1, of a painted mask also between;
        the part, where one with grey around it is the whole.

    Raises:
        ValueError: `size` does not fit `mask_divisor`, or `image` is not RGB.
    """
    _check_size(size, mask_divisor)
    shape = shape or image.size
    if hflip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        painted = painted and painted.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = draw_scale(size, mask_divisor, rng)
    full = _full_mask(size, mask_divisor)
    complete = full if painted is None else mask_cells(painted, (size, size), mask_divisor)
    if scale < FAR_BELOW * size:
        top, left = (_integer(0, size - scale + 1, rng) for _ in range(2))
        mask = _inner(full, (top, left), scale, mask_divisor=mask_divisor)
        if painted is not None:
            mask = mask * _pasted_cells(painted, (top, left), scale, size=size, like=full)
        if mask.any():
            pixels = _paste(image, (top, left), scale, size=size)
            return pixels, _prefixed(caption, FAR_PREFIXES, rng), mask, whole(pixels)
    elif scale > size:
        top, left = (_integer(0, scale - size + 1, rng) for _ in range(2))
        box = (left, top, left + size, top + size)
        mask = full if painted is None else _cropped_cells(painted, box, scale, like=full)
        if mask.any():
            pixels = to_tensor(resize_cover(image, scale).crop(box))
            above, before = covered(shape, (scale, scale))
            part = (shape[1], shape[0], above + top, before + left, size, size)
            return pixels, _prefixed(caption, CLOSE_PREFIXES, rng), mask, part
    return to_tensor(resize_cover(image, size)), caption, complete, central(shape, (size, size))


def draw_scale(size: int, mask_divisor: int, rng: Uniform) -> int:
    """A random side in pixels to which the photo is scaled, see the top of this file.

    The lower end is raised to 3 mask cells where `size / 3` is less: below that the cut of the
    mask's border could leave no cell at all, and the masked loss would divide by zero. Sizes of
    at least 9 mask cells, hence all usual ones, are not affected.
    """
    if rng.random() < SMALL_PROBABILITY:
        return _integer(max(size // 3, 3 * mask_divisor), size + 1, rng)
    low, _ = CLOSE_RANGE
    return _integer(int(low * size), largest_scale(size), rng)


def largest_scale(size: int) -> int:
    """The side to which a photo is scaled at most: what is kept of one needs no more pixels."""
    return int(CLOSE_RANGE[1] * size)


def _paste(image: Image.Image, place: tuple[int, int], scale: int, *, size: int) -> Tensor:
    """The photo on grey. place: top and left, in pixels."""
    import torch

    top, left = place
    pixels = torch.zeros(3, size, size)
    pixels[:, top : top + scale, left : left + scale] = to_tensor(resize_cover(image, scale))
    return pixels


def _inner(full: Tensor, place: tuple[int, int], scale: int, *, mask_divisor: int) -> Tensor:
    """The mask of a pasted photo's inner cells."""
    import torch

    mask = torch.zeros_like(full)
    rows, columns = (_inner_cells(start, scale, mask_divisor) for start in place)
    mask[:, rows, columns] = 1.0
    return mask


def _pasted_cells(
    painted: Image.Image, place: tuple[int, int], scale: int, *, size: int, like: Tensor
) -> Tensor:
    """The painted mask of a pasted photo, black around it."""
    canvas = Image.new("L", (size, size))
    canvas.paste(resize_cover(painted, scale), (place[1], place[0]))
    return mask_cells(canvas, (size, size), size // like.shape[-1])


def _cropped_cells(
    painted: Image.Image, box: tuple[int, int, int, int], scale: int, *, like: Tensor
) -> Tensor:
    cut = resize_cover(painted, scale).crop(box)
    return mask_cells(cut, cut.size, cut.width // like.shape[-1])


def _inner_cells(start: int, length: int, divisor: int) -> slice:
    # One cell less than fits on each side, as the official code has it: the VAE's receptive field
    # reaches over a cell's border, so latents at the rim are a mixture of photo and grey.
    return slice(start // divisor + 1, (start + length) // divisor - 1)


def _full_mask(size: int, mask_divisor: int) -> Tensor:
    import torch

    return torch.ones(1, size // mask_divisor, size // mask_divisor)


def _prefixed(caption: str, prefixes: tuple[str, ...], rng: Uniform) -> str:
    return prefixed(caption, prefixes[_integer(0, len(prefixes), rng)])


def prefixed(caption: str, prefix: str) -> str:
    """`prefix` in the place of a caption's leading article."""
    return prefix + re.sub(r"^(an?|the)\s+", "", caption, flags=re.IGNORECASE)


def _integer(low: int, high: int, rng: Uniform) -> int:
    """A uniformly random integer from low, ..., high - 1."""
    return low + int(rng.random() * (high - low))


def _check_size(size: int, mask_divisor: int) -> None:
    if mask_divisor < 1 or size % mask_divisor or size < 6 * mask_divisor:
        raise ValueError(
            f"size={size} does not fit mask_divisor={mask_divisor}; choose a multiple of it that "
            "is at least 6 times as large"
        )
