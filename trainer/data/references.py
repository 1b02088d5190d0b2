"""Reference pictures: what a sample shows, told by another picture, as an input of batches called
`reference`. The embedded world draws them, a folder has them beside its photos; of other data a
picture is its own reference, as IP-Adapter is trained (arXiv 2308.06721, section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE = "reference"  # the name of the input of a batch, (b, pictures, 3, S, S)


@runtime_checkable
class Referenced(Protocol):
    """A dataset that knows reference pictures of its samples."""

    def reference(self, index: int) -> Tensor | None:
        """(pictures, 3, S, S) in [-1, 1], of one shape in all samples; None where a sample is its
        own reference."""
        ...


def itself(image: Tensor) -> Tensor:
    """A picture (3, H, W), or the middle frame of a clip (frames, 3, H, W), as the one reference
    picture (1, 3, S, S), its centre."""
    picture = image if image.ndim == 3 else image[len(image) // 2]
    height, width = picture.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[None, :, top : top + side, left : left + side]
