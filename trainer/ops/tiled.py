"""Softmax attention in tiles, as an op."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from trainer.attention.op import Traits
from trainer.kernels.tiled import COLUMNS, ROWS, tiled

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall


class TiledOp:
    """A kernel op: attention of the site in tiles."""

    name = "tiled"
    traits = Traits(owner="tiled")

    def __init__(self, rows: int = ROWS, columns: int = COLUMNS) -> None:
        self.rows, self.columns = rows, columns

    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: SiteCall
    ) -> Tensor:
        return tiled(q, k, v, mask=mask, scale=call.scale, rows=self.rows, columns=self.columns)
