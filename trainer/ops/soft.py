"""SOFT instead of a site's softmax attention: a Gaussian kernel, with landmarks on the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention.op import Traits, label
from trainer.attention.op_conflicts import refuse_mask, refuse_other_keys
from trainer.kernels.soft import dense_soft_attention, soft_attention
from trainer.ops.grid_modules import Shortcut

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.sites import Site
    from trainer.kernels.token_merging import Grid


class Landmarks(nn.Module):
    """l = GELU(LN(conv(q))): a convolution over ratio x ratio cells of the grid, one for all heads,
    as in the authors' code."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.conv = nn.Conv2d(width, width, kernel_size=ratio, stride=ratio, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, q: Tensor, grid: Grid) -> Tensor:
        """q (b, h, n, d) to l (b, h, m, d), m the number of complete cells."""
        batch, heads, _, width = q.shape
        image = q.flatten(0, 1).transpose(1, 2).reshape(batch * heads, width, *grid)
        cells = self.conv(image).flatten(2).transpose(1, 2)  # (b h) m d
        return F.gelu(self.norm(cells)).unflatten(0, (batch, heads))


class SoftOp(nn.Module):
    """A kernel op: `soft_attention`. Its queries are its keys: both are the mean of the site's q
    and k, so that one projection, the mean of the two, stands for both and each of them learns.

    ratio: tokens of a side of the grid that become one landmark; with 1 every token is one, and no
    inverse is needed. shortcut: size of a depthwise convolution over the values, 0 for none.
    """

    name = "soft"
    traits = Traits(owner="soft", masks=False, more_keys=False, swaps=True, grid=True)

    def __init__(self, site: Site, ratio: int, iterations: int = 20, shortcut: int = 3) -> None:
        super().__init__()
        self.ratio, self.iterations = ratio, iterations
        self.landmarks = Landmarks(site.head_dim, ratio)
        self.shortcut = Shortcut(site.heads * site.head_dim, shortcut) if shortcut else None

    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: SiteCall
    ) -> Tensor:
        refuse_mask(mask, self, call)
        refuse_other_keys(q, k, op=self, call=call)
        grid = call.grid(q.shape[2], label(self))
        if min(grid) < self.ratio:
            raise ValueError(
                f"methods.soft: {call.site.name!r} has a grid of {grid[0]} x {grid[1]} tokens, "
                f"where {self.ratio} x {self.ratio} are to become one landmark; give a smaller "
                "ratio"
            )
        scale = q.shape[-1] ** -0.5 if call.scale is None else call.scale
        tied = (q + k) / 2 * scale**0.5
        landmarks = self.landmarks(tied.float(), grid)
        if self.ratio == 1:
            o = dense_soft_attention(landmarks, v)
        else:
            o = soft_attention(tied, landmarks, v, iterations=self.iterations)
        return o if self.shortcut is None else o + self.shortcut(v, grid)
