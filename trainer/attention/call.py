"""One run of one attention layer, as its ops see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.attention.grid import token_grid

if TYPE_CHECKING:
    from trainer.attention.context import StepContext
    from trainer.attention.op import Op
    from trainer.attention.sites import Site


class SiteCall:
    """Which layer runs, under which step context, and what the stages of an op share meanwhile.

    It is made anew whenever the layer runs, also when gradient checkpointing runs it a second time,
    and is gone afterwards: an op that keeps a tensor here, not on itself, holds no memory between
    layers and never meets the tensor of another layer or step. The `block` stage runs after the
    layer and gets a call of its own.
    """

    def __init__(self, site: Site, ctx: StepContext) -> None:
        self.site, self.ctx = site, ctx
        self._scratch: dict[str, dict[str, Any]] = {}

    def scratch(self, op: Op) -> dict[str, Any]:
        """What this op has kept in earlier stages of this run; empty at first."""
        return self._scratch.setdefault(op.name, {})

    def grid(self, tokens: int, who: str) -> tuple[int, int]:
        """Height and width of the layer's token grid; ValueError as `token_grid`."""
        return token_grid(tokens, site=self.site, ctx=self.ctx, who=who)
