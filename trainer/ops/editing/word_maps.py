"""Where words are in a picture, by the cross-attention maps of their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall


class WordMaps:
    """Maps of words, summed over the steps, by site.

    most: grids of more tokens are left out; of the others, the finest makes the mask. In Stable
    Diffusion at 512 pixels these are the sites of 16x16 tokens, as in the code of Prompt-to-Prompt.
    option: what a user gives for it, for refusals.
    """

    def __init__(self, most: int = 16 * 16, option: str = "blend_tokens") -> None:
        self.most, self.option = most, option
        self.sums: dict[str, Tensor] = {}

    def takes(self, tokens: int) -> bool:
        return tokens <= self.most

    def add(self, name: str, maps: Tensor) -> None:
        """maps (rows, h, w) of a site at one step. They begin anew where their size changes: what
        was there before is of a picture that was made on the way to a larger one."""
        before = self.sums.get(name)
        if before is not None and before.shape == maps.shape:
            maps = before + maps
        self.sums[name] = maps

    def add_words(self, probs: Tensor, columns: Tensor, *, call: SiteCall, who: str) -> None:
        """Of attention maps (rows, heads, n, m) the sum over the columns of words, as a mean over
        heads. columns (b, m): 1 for tokens of the words, of b clips whose frames are the rows; who:
        asks, for refusals."""
        grid = call.grid(probs.shape[2], who)
        own = probs.mean(1).float()  # rows n m
        weights = columns.repeat_interleave(len(own) // len(columns), 0).to(own)
        self.add(call.site.name, (own @ weights[..., None])[..., 0].unflatten(-1, grid))

    def average(self) -> Tensor:
        """(rows, h, w) over the sites of the finest grid; of each step the same share.

        Raises:
            ValueError: there are none yet.
        """
        if not self.sums:
            raise ValueError(
                f"no layer that reads the words has at most {self.most} tokens, of whose maps the "
                f"mask would be made; give more {self.option}"
            )
        finest = max(maps[0].numel() for maps in self.sums.values())
        chosen = [maps for maps in self.sums.values() if maps[0].numel() == finest]
        return torch.stack(chosen).mean(0)


def word_mask(maps: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """Maps (rows, h, w) to masks (rows, 1, *size), true where a word is: the largest value of each
    3x3 neighbourhood, scaled up by nearest neighbours, divided by the largest of the row, above
    `threshold` (Prompt-to-Prompt's "local blending", as its code has it). A row of zeros is empty.
    """
    grown = F.max_pool2d(maps[:, None], 3, stride=1, padding=1)
    large = F.interpolate(grown, size=size)
    most = large.amax((-2, -1), keepdim=True)
    return large > threshold * most


def to_unit(maps: Tensor) -> Tensor:
    """Maps (rows, ..) with the smallest value of each row at 0 and its largest at 1; a row of equal
    values becomes 0."""
    flat = maps.flatten(1)
    least, most = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return ((flat - least) / (most - least).clamp_min(1e-12)).unflatten(1, maps.shape[1:])


def mask_above(maps: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """Maps (rows, h, w) to masks (rows, 1, *size): `to_unit`, by nearest neighbours, above
    `threshold` (MasaCtrl, arXiv 2304.08465, section 3.3). A row of equal values is empty."""
    return F.interpolate(to_unit(maps)[:, None], size=size) > threshold
