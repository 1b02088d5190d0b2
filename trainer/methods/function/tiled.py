"""Tiled attention: the same softmax attention in O(n + m) memory, forward and backward.

FlashAttention, Dao et al., arXiv 2205.14135, algorithm 1, and FlashAttention-2, arXiv 2307.08691,
section 3.1: a running maximum and sum over tiles of keys; the backward computes the tiles again. It
is plain PyTorch, so it runs on any device and with any mask, also a learned one, and equals softmax
attention up to rounding.

    python -m trainer fit recipe=lora 'methods.tiled={}'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Method
from trainer.methods.shared.kernel import installed
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Tiled(Method):
    """How large the tiles are. It trains nothing by itself."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "FlashAttention"
    paper: ClassVar[str] = "arXiv 2205.14135"

    sites: SiteSelector = Field("all", description=f"attention that uses it: {SELECTOR}")
    rows: int = Field(512, gt=0, description="queries of a tile, at most")
    columns: int = Field(512, gt=0, description="keys of a tile, at most")

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.tiled import TiledOp as Op

        chosen = require(model.sites, self.sites, "sites")
        return installed(model, Op(self.rows, self.columns), chosen)
