"""Which tokens ToMe merges at a site: those that are most alike by cosine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from trainer.common.seeds import seed_of
from trainer.kernels.token_merging import Groups, match

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.context import StepContext


class Bipartite:
    """A planner, see `merged_sites.py`. The random targets are a function of the seed and of the
    step; in training, of the timesteps of the batch, so that a run that resumes repeats them."""

    def __init__(self, ratio: float, cell: int, seed: int) -> None:
        self.ratio, self.cell, self.seed = ratio, cell, seed

    def __call__(self, x: Tensor, grid: tuple[int, int], call: SiteCall) -> Groups | None:
        if int(self.ratio * x.shape[1]) == 0:
            return None
        return match(x, grid, cell=self.cell, seed=draw_of(self.seed, call.ctx)).groups(self.ratio)


def draw_of(seed: int, ctx: StepContext) -> int:
    """The seed of what one call of the denoiser draws, the same at all its sites."""
    if not ctx.training:
        return seed_of(seed, "tokens", ctx.step)
    return seed_of(seed, "tokens", *ctx.timestep.flatten().tolist())
