"""Where words are in a picture, by the cross-attention maps of their tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class WordMaps:
    """Maps of words, summed over the steps, by site.

    most: grids of more tokens are left out; of the others, the finest makes the mask. In Stable
    Diffusion at 512 pixels these are the sites of 16x16 tokens, as in the code of Prompt-to-Prompt.
    """

    def __init__(self, most: int = 16 * 16) -> None:
        self.most = most
        self.sums: dict[str, Tensor] = {}

    def takes(self, tokens: int) -> bool:
        return tokens <= self.most

    def add(self, name: str, maps: Tensor) -> None:
        """maps (rows, h, w) of a site at one step."""
        self.sums[name] = self.sums[name] + maps if name in self.sums else maps

    def average(self) -> Tensor:
        """(rows, h, w) over the sites of the finest grid; of each step the same share.

        Raises:
            ValueError: there are none yet.
        """
        if not self.sums:
            raise ValueError(
                f"no site of cross-attention has at most {self.most} tokens, of whose maps the "
                "mask would be made; give more blend_tokens"
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
