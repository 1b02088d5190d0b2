"""Which tokens ToMA keeps at a site, and how the others are shared out to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from trainer.kernels.soft_merging import SoftGroups, Tiling, chosen_tokens, soft_groups

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall

Key = tuple[str, tuple[int, ...]]


class Facilities:
    """A planner, see `merged_sites.py`. While sampling, the tokens chosen at a site serve for
    `choose_every` steps and the shares for `share_every`; they are forgotten in between samplings,
    and in training chosen at every call."""

    def __init__(
        self, ratio: float, tile: int, sharpness: float, *, choose_every: int, share_every: int
    ) -> None:
        self.ratio, self.tile, self.sharpness = ratio, tile, sharpness
        self.choose_every, self.share_every = choose_every, share_every
        self.chosen: dict[Key, tuple[int, Tensor]] = {}
        self.shared: dict[Key, tuple[int, SoftGroups]] = {}

    def __call__(self, x: Tensor, grid: tuple[int, int], call: SiteCall) -> SoftGroups | None:
        tiling = Tiling.of(grid, self.tile)
        count = tiling.tokens - int(self.ratio * tiling.tokens)
        if count == tiling.tokens:
            return None
        step = call.ctx.step
        if call.ctx.num_steps == 1:
            return self._shared_out(x, tiling, chosen_tokens(x, tiling, count))
        key = (call.site.name, (len(x), *grid))
        anew = key not in self.chosen or not _serves(self.chosen[key][0], step, self.choose_every)
        if anew:
            self.chosen[key] = (step, chosen_tokens(x, tiling, count))
        if anew or not _serves(self.shared[key][0], step, self.share_every):
            self.shared[key] = (step, self._shared_out(x, tiling, self.chosen[key][1]))
        return self.shared[key][1]

    def forget(self, *_: object) -> None:
        """Before and after a sampling."""
        self.chosen.clear()
        self.shared.clear()

    def _shared_out(self, x: Tensor, tiling: Tiling, chosen: Tensor) -> SoftGroups:
        return soft_groups(x, tiling, chosen, sharpness=self.sharpness)


def _serves(made: int, step: int, every: int) -> bool:
    """Whether what was made before step `made` is still used before `step`."""
    return made <= step < made + every
