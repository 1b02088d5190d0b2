"""Linear attention in the place of a site's softmax attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from trainer.attention.grid import token_grid
from trainer.attention.op import refuse_mask, refuse_other_keys
from trainer.kernels.agent import Shortcut
from trainer.kernels.linear import FEATURES, linear_attention, orthogonal_gaussian, random_features

if TYPE_CHECKING:
    from trainer.attention.context import StepContext
    from trainer.attention.sites import Site


class LinearAttentionOp(nn.Module):
    """A kernel op: `linear_attention` with the features of that name in `FEATURES`, or "random"
    ones, `num_features` of them drawn from `seed`.

    shortcut: size of a depthwise convolution over the values, 0 for none.
    """

    name = owner = "linear_attention"
    masks = False
    swaps = True
    projection: Tensor

    def __init__(
        self, site: Site, features: str, num_features: int = 64, seed: int = 0, shortcut: int = 0
    ) -> None:
        super().__init__()
        if features == "random":
            projection = orthogonal_gaussian(num_features, site.head_dim, seed)
            self.register_buffer("projection", projection, persistent=False)
        self.features = features
        self.shortcut = Shortcut(site.heads * site.head_dim, shortcut) if shortcut else None
        self.more_keys = not shortcut

    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, site: Site, ctx: StepContext
    ) -> Tensor:
        refuse_mask(mask, self, site)
        random = self.features == "random"
        features = random_features(self.projection) if random else FEATURES[self.features]
        o = linear_attention(q, k, v, features, site.scale)
        if self.shortcut is None:
            return o
        refuse_other_keys(q, k, self, site)
        grid = token_grid(v.shape[2], site, ctx, f"methods.{self.owner}")
        return o + self.shortcut(v, grid)
