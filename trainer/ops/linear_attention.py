"""Linear attention instead of a site's softmax attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from trainer.attention.op import Traits, label
from trainer.attention.op_conflicts import refuse_mask, refuse_other_keys
from trainer.common.seeds import seed_of
from trainer.kernels.linear_attention import (
    FEATURES,
    Features,
    linear_attention,
    orthogonal_gaussian,
    random_features,
)
from trainer.ops.grid_modules import Shortcut

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.sites import Site


class LinearAttentionOp(nn.Module):
    """A kernel op: `linear_attention` with the features of that name in `FEATURES`, or "random"
    ones, `num_features` of them, a function of `seed`.

    shortcut: size of a depthwise convolution over the values, 0 for none. redraw: with random
    features, training has new ones after so many steps, a function of `seed` and the step, so that
    a run that resumes has them too; 0 keeps the first. Outside training they are always the first.
    """

    name = "linear_attention"
    projection: Tensor
    drawn: Tensor

    def __init__(
        self,
        site: Site,
        features: str,
        *,
        num_features: int = 64,
        seed: int = 0,
        shortcut: int = 0,
        redraw: int = 0,
    ) -> None:
        super().__init__()
        if features == "random":
            projection = orthogonal_gaussian(num_features, site.head_dim, seed)
            self.register_buffer("projection", projection, persistent=False)
            self.register_buffer("drawn", projection.clone(), persistent=False)
        self.features, self.seed, self.redraw, self.draw = features, seed, redraw, 0
        self.shortcut = Shortcut(site.heads * site.head_dim, shortcut) if shortcut else None
        self.traits = Traits(
            owner="linear_attention",
            masks=False,
            more_keys=not shortcut,
            swaps=True,
            grid=bool(shortcut) or features == "cos",  # weighs tokens by their distance
        )

    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: SiteCall
    ) -> Tensor:
        refuse_mask(mask, self, call)
        features = self._random() if self.features == "random" else FEATURES[self.features]
        o = linear_attention(q, k, v, features=features, scale=call.scale)
        if self.shortcut is None:
            return o
        refuse_other_keys(q, k, op=self, call=call)
        grid = call.grid(v.shape[2], label(self))
        return o + self.shortcut(v, grid)

    def at_step(self, step: int) -> None:
        """Draws the features of a training step, where it is another draw's."""
        draw = step // self.redraw
        if draw != self.draw:
            seed = seed_of(self.seed, "features", draw) if draw else self.seed
            count, width = self.projection.shape
            self.drawn.copy_(orthogonal_gaussian(count, width, seed))
            self.draw = draw

    def _random(self) -> Features:
        return random_features(self.drawn if self.training else self.projection)
