"""Softmax attention in tiles, as an op."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from trainer.kernels.tiled import COLUMNS, ROWS, tiled

if TYPE_CHECKING:
    from trainer.attention.context import StepContext
    from trainer.attention.sites import Site


class TiledOp:
    """A kernel op: attention of the site in tiles."""

    name = owner = "tiled"

    def __init__(self, rows: int = ROWS, columns: int = COLUMNS) -> None:
        self.rows, self.columns = rows, columns

    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, site: Site, ctx: StepContext
    ) -> Tensor:
        scale = site.scale
        return tiled(q, k, v, mask, scale, self.rows, self.columns)
