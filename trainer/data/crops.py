"""Which part of its picture a sample shows, as some models are told (SDXL, arXiv 2307.01952,
section 2.2): so that a model can learn from small and cut pictures without making such ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.data.buckets import Size

# height and width of the whole picture; top and left of the part, where the whole one is scaled to
# cover it; height and width of the part; in pixels
Crop = tuple[int, int, int, int, int, int]
CROP = "crop"  # the name of the input of a batch, (b, 6)


@runtime_checkable
class Cropped(Protocol):
    """A dataset that knows which part of its picture each sample shows, where augmentation does not
    draw it."""

    def crop(self, index: int) -> Crop: ...


def whole(image: Tensor) -> Crop:
    """Of a picture (3, H, W), or a clip (frames, 3, H, W), that is not known to be cut."""
    height, width = image.shape[-2:]
    return height, width, 0, 0, height, width


def square(side: int) -> Crop:
    """Of a square picture that is not cut."""
    return side, side, 0, 0, side, side


def central(shape: Size, size: Size) -> Crop:
    """Of a picture of a `shape`, width and height, that `cover` cuts to a `size`."""
    top, left = covered(shape, size)
    return shape[1], shape[0], top, left, size[1], size[0]


def covered(shape: Size, size: Size) -> tuple[int, int]:
    """Top and left of the centre that `cover` cuts out of a scaled picture."""
    scale = max(size[0] / shape[0], size[1] / shape[1])
    left, top = (round((a * scale - b) / 2) for a, b in zip(shape, size, strict=True))
    return top, left
