"""A depthwise convolution over the tokens on their grid, after the block around a site."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainer.attention.op import Traits, label
from trainer.ops.grid_modules import Shortcut

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.sites import Site


class BlockConvolution(nn.Module):
    """x <- DWConv(x) of `size` * `size`, the identity at the start: the local part of DiG's blocks,
    arXiv 2405.18428.

    Attention by a scan reaches far along one line; this mixes neighbouring tokens.
    """

    name = "block_convolution"

    def __init__(self, site: Site, size: int, owner: str) -> None:
        super().__init__()
        self.traits = Traits(owner=owner, grid=True)
        self.depthwise = Shortcut(site.projection("q").in_features, size)
        nn.init.dirac_(self.depthwise.weight, groups=len(self.depthwise.weight))

    def block(self, x: Tensor, call: SiteCall) -> Tensor:
        grid = call.grid(x.shape[1], label(self))
        # the output of all earlier blocks passes through it: under autocast each would round it
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = self.depthwise(x.unsqueeze(1), grid)
        return y.squeeze(1)
