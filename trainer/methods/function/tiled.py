"""Tiled attention: the same softmax attention in O(n + m) memory, forward and backward.

FlashAttention, Dao et al., arXiv 2205.14135, algorithm 1, and FlashAttention-2, arXiv 2307.08691,
section 3.1: a running maximum and sum over tiles of keys; the backward computes the tiles again. In
plain PyTorch, so on any device and with any mask, one that is learned too; equal but for rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainer.methods.method import Edit, Method
from trainer.methods.shared.kernel import installed
from trainer.methods.shared.options import SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Tiled(Method):
    """rows, columns: the largest tile of queries and keys. It trains nothing by itself."""

    kind: ClassVar[Literal["attention"]] = "attention"
    sites: SiteSelector = "all"
    rows: int = Field(512, gt=0)
    columns: int = Field(512, gt=0)

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.tiled import TiledOp as Op

        chosen = require(model.sites, self.sites, "sites")
        return installed(model, Op(self.rows, self.columns), chosen)
