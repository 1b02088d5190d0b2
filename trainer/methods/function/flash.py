"""Flash: PyTorch's fused attention by a chosen backend, and a report of what really ran.

FlashAttention-2, Dao, arXiv 2307.08691, as PyTorch has it. Without this method PyTorch chooses
too, but falls back to plain matrix products without a message; here that is an error, and the
backend of each site is printed after the first batch and kept in the run's plan.json. What later
tensors of another kind get is logged (`trainer.kernels.flash`, level INFO).

    python -m trainer fit recipe=lora 'methods.flash={}'
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Method
from trainer.methods.shared.kernel import installed
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Flash(Method):
    """Which backend must run, and where. It trains nothing by itself."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "FlashAttention-2"
    paper: ClassVar[str] = "arXiv 2307.08691"

    sites: SiteSelector = Field("all", description=f"attention that uses it: {SELECTOR}")
    backend: Literal["auto", "flash", "efficient", "cudnn", "math"] = Field(
        "flash",
        description="the backend that must run, or it is an error; auto leaves the choice to "
        "PyTorch and reports it. A CPU has flash and math",
    )

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.flash import FlashOp as Op

        chosen = require(model.sites, self.sites, "sites")
        op = Op(None if self.backend == "auto" else self.backend)
        return replace(installed(model, op, chosen), report=op.report)
