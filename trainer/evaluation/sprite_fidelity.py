"""Fidelity: how close a generated sprite is to the drawing it should show.

A judge says which sprite a picture resembles most, and a rough shape is enough for that. Here the
true drawing is laid over the picture at every place, in many sizes and in both directions, and the
best match is scored by structure (SSIM, Wang et al. 2004, doi 10.1109/TIP.2003.819861)
and by colour (the intersection of colour histograms, Swain and Ballard 1991).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from trainer.data.world.sprites import scaled

SIZES = range(16, 53, 4)  # longer side of the drawing in pixels; the world draws 16 to 48
FINER = (-2, -1, 1, 2)  # sizes around the best of these that are tried next
BINS = 6  # of each colour channel
RIM = 2  # pixels around the drawing that count too, so that its outline does


@dataclass(frozen=True)
class Fidelity:
    """Of n pictures: structure and colour, both (n,); 1 is the drawing itself, 0 no likeness."""

    structure: Tensor
    colour: Tensor

    @property
    def score(self) -> float:
        """The mean of both, over all pictures."""
        return float((self.structure + self.colour).mean() / 2)


@dataclass(frozen=True)
class Template:
    """A drawing in one size: colour (3, h, w) times its opacity (h, w), in [0, 1]."""

    colour: Tensor
    opacity: Tensor


def fidelity(pictures: Tensor, words: Sequence[str]) -> Fidelity:
    """How close each picture (n, 3, side, side) in [-1, 1] comes to the sprite of its word.

    Raises:
        ValueError: a word names no sprite, or there is not one word for each picture.
    """
    if len(words) != len(pictures):
        raise ValueError(f"{len(words)} words for {len(pictures)} pictures; give one for each")
    best = torch.full((2, len(words)), -1.0)
    for word in dict.fromkeys(words):
        rows = [row for row, each in enumerate(words) if each == word]
        best[:, rows] = _best_match((pictures[rows].float().cpu() + 1) / 2, word)
    return Fidelity(*best.clamp(min=0))


def _best_match(pictures: Tensor, word: str) -> Tensor:
    """Structure and colour (2, n) of the best match in any size and direction."""
    count, side = len(pictures), pictures.shape[-1]
    best = torch.full((2, count), -1.0)
    chosen = [(0, False)] * count  # the size, and whether it is mirrored

    def attempt(rows: list[int], size: int, mirrored: bool) -> None:
        found = torch.stack(_match(pictures[rows], _template(word, size, mirrored)))
        for row, each in zip(rows, found.T, strict=True):
            if each.sum() > best[:, row].sum():
                best[:, row], chosen[row] = each, (size, mirrored)

    for size in SIZES:
        for mirrored in (False, True):
            if size <= side:
                attempt(list(range(count)), size, mirrored)
    coarse = list(chosen)
    for step in FINER:
        for size, mirrored in sorted(set(coarse)):
            if size + step <= side:
                rows = [row for row in range(count) if coarse[row] == (size, mirrored)]
                attempt(rows, size + step, mirrored)
    return best


def _template(word: str, size: int, mirrored: bool) -> Template:
    drawn = torch.from_numpy(np.moveaxis(scaled(word, size), -1, 0).copy())
    drawn = drawn.flip(-1) if mirrored else drawn
    return Template(drawn[:3], drawn[3])


def _match(pictures: Tensor, template: Template) -> tuple[Tensor, Tensor]:
    """Structure and colour, each (n,), of the template at its best place in each picture."""
    tops, lefts = _place(pictures, template)
    drawn, masks = [], []
    for picture, top, left in zip(pictures, tops, lefts, strict=True):
        one, mask = _drawn(picture, template, top=top, left=left)
        drawn.append(one)
        masks.append(mask)
    wanted, mask = torch.stack(drawn), torch.stack(masks)
    near = F.max_pool2d((mask > 0.5).float()[:, None], 2 * RIM + 1, stride=1, padding=RIM)[:, 0]
    _, each = structural_similarity_index_measure(
        pictures, wanted, data_range=1.0, return_full_image=True
    )
    structure = (each.mean(1) * near).sum((1, 2)) / near.sum((1, 2))
    inside = (mask > 0.5).float()
    shared = torch.minimum(_histogram(pictures, inside), _histogram(wanted, inside))
    return structure, shared.sum(1)


def _place(pictures: Tensor, template: Template) -> tuple[list[int], list[int]]:
    """The top and left pixel at which the template differs least from each picture, as the mean
    squared difference under its opacity."""
    side, (height, width) = pictures.shape[-1], template.opacity.shape
    squares = _correlated(pictures.square().sum(1), template.opacity)
    products = _correlated(pictures, template.colour).sum(1)
    error = squares - 2 * products  # the rest is the same at every place
    error = error[:, : side - height + 1, : side - width + 1]
    columns = error.shape[-1]
    first = error.flatten(1).argmin(1).tolist()
    return [place // columns for place in first], [place % columns for place in first]


def _correlated(pictures: Tensor, pattern: Tensor) -> Tensor:
    """The sum of products with a pattern laid with its top left corner on each pixel, by the
    Fourier transform; right wherever the pattern does not leave the picture."""
    size = pictures.shape[-2:]
    return torch.fft.irfft2(
        torch.fft.rfft2(pictures) * torch.fft.rfft2(pattern, s=size).conj(), s=size
    )


def _drawn(picture: Tensor, template: Template, *, top: int, left: int) -> tuple[Tensor, Tensor]:
    """The picture as it should be, (3, side, side): the template on the picture's own background,
    which is the median of each row beside the template. And the template's opacity there."""
    side = picture.shape[-1]
    height, width = template.opacity.shape
    beside = [column for column in range(side) if not left <= column < left + width]
    rows = picture[:, :, beside or [0, side - 1]].median(-1, keepdim=True).values
    canvas = rows.expand_as(picture).clone()
    mask = torch.zeros(side, side)
    mask[top : top + height, left : left + width] = template.opacity
    colour = torch.zeros_like(picture)
    colour[:, top : top + height, left : left + width] = template.colour
    return canvas * (1 - mask) + colour, mask


def _histogram(pictures: Tensor, mask: Tensor) -> Tensor:
    """Colour histograms (n, BINS^3) of the pixels under a mask (n, side, side), summing to 1. A
    pixel is shared by the bins nearest to it, so a small shift of colour changes little."""
    place = pictures.clamp(0, 1) * (BINS - 1)
    low = place.floor().clamp(max=BINS - 2)
    part = place - low
    found = torch.zeros(len(pictures), BINS**3)
    for corner in range(8):
        steps = torch.tensor([corner >> 2 & 1, corner >> 1 & 1, corner & 1]).view(1, 3, 1, 1)
        share = torch.where(steps == 1, part, 1 - part).prod(1) * mask
        bins = low + steps
        index = (bins[:, 0] * BINS + bins[:, 1]) * BINS + bins[:, 2]
        found.scatter_add_(1, index.flatten(1).long(), share.flatten(1))
    return found / mask.sum((1, 2)).clamp(min=1e-6)[:, None]
