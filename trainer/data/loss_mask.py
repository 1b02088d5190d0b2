"""The mask of a photo as weights of its latents in the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageOps

from trainer.media.images import ImageError

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Masked(Protocol):
    """A dataset some of whose samples have a mask that does not depend on random numbers."""

    def loss_mask(self, index: int) -> Tensor | None:
        """Weights (1, H/f, W/f) of the latents of sample `index` in [0, 1], None for all alike."""
        ...


def mask_cells(mask: Image.Image, size: tuple[int, int], divisor: int) -> Tensor:
    """A mask, 8-bit grey, cut as its photo is cut to `size` (width, height): the mean of each
    latent's pixels, (1, H/f, W/f) in [0, 1]. divisor: pixels per latent along an edge."""
    import torch

    cells = ImageOps.fit(mask, (size[0] // divisor, size[1] // divisor), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(cells, np.float32) / 255)[None]


def checked_cells(mask: Image.Image, size: tuple[int, int], *, divisor: int, name: str) -> Tensor:
    """`mask_cells`; ImageError where the part that is cut out has nothing of the mask."""
    cells = mask_cells(mask, size, divisor)
    if not bool(cells.any()):
        raise ImageError(
            f"{name}: its mask leaves nothing of the centre of {size[0]}x{size[1]} pixels that is "
            "trained on; paint some of it white, or crop the photo and its mask"
        )
    return cells
