"""SLA: the blocks of keys that matter most by softmax attention, the rest by linear attention with
a trained projection.

    o = o_sparse + W o_linear

Zhang et al., arXiv 2509.24006. Which blocks are critical is found at every call from the means of
blocks of queries and keys; blocks that matter least are left out. W trains, from zero, so that at
first attention is to the critical blocks alone; the paper fine-tunes the model with it:

    python -m trainer fit recipe=sla

Blocks of 64 tokens are the paper's; on a CPU those of 128 and more are faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.swap import Swap

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Sla(Swap):
    """How many blocks are exact, and how many are left out."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "SLA (sparse-linear attention)"
    paper: ClassVar[str] = "arXiv 2509.24006"

    block: int = Field(64, gt=0, description="tokens of a block, in the order of the site")
    critical: float = Field(
        0.05,
        gt=0,
        le=1,
        description="share of the blocks of keys that are exact, at least one; 1 is softmax "
        "attention",
    )
    negligible: float = Field(
        0.1, ge=0, lt=1, description="share of the blocks that are left out altogether"
    )

    @model_validator(mode="after")
    def _leaves_a_rest(self) -> Sla:
        if self.critical < 1 and self.critical + self.negligible >= 1:
            raise ValueError(
                f"critical={self.critical:g} and negligible={self.negligible:g} leave nothing for "
                "linear attention; give less of one"
            )
        return self

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.kernels.sla import Shares
        from trainer.ops.sla import SparseLinear

        for site in require(model.sites, self.sites, "sites"):
            if site.kind == "cross":
                raise ValueError(
                    f"{site.name} is cross-attention, whose keys are few; choose sites=self"
                )
        shares = Shares(self.block, self.critical, self.negligible)
        return self.swap(model, lambda _, site: SparseLinear(site, shares))
