"""TREAD: in training, random tokens pass most blocks by and come back behind them, so that a step
takes less time.

    x_stays = blocks(x_stays)    x_routed = x_routed    from one block to a later one

Krause et al., ICCV 2025, arXiv 2501.04765: one route, half of the tokens, from an early block to a
late one. Other tokens are routed in every picture and step. Sampling and validation see all tokens.
It trains nothing by itself:

    python -m trainer fit recipe=tread
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind, Method
from trainer.methods.shared.merging import TOKENS
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.attention.sites import Site


class Tread(Method):
    """How many tokens are routed, past which blocks."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "TREAD"
    paper: ClassVar[str] = "arXiv 2501.04765"

    sites: SiteSelector = Field(
        "self", description=f"attention of the stacks with a route: {SELECTOR}"
    )
    ratio: float = Field(0.5, ge=0, lt=1, description="share of the tokens that are routed")
    first: int = Field(1, gt=0, description="blocks of a stack before the route, which see all")
    last: int = Field(1, ge=0, description="blocks behind the route, which see all")
    seed: int = Field(0, ge=0, description="of the tokens that are drawn")

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.ops.reduction.stacks import blocks_around, stacks_of
        from trainer.ops.reduction.tread import TokenRoute

        stacks = stacks_of(model, self.sites, "it")
        ends = {name: self._ends(own) for name, own in stacks.items()}
        routed = {name: pair for name, pair in ends.items() if pair is not None}
        if not routed:
            longest = max(len(own) for own in stacks.values())
            raise ValueError(
                f"first={self.first} and last={self.last} leave no block that tokens could pass "
                f"by: stacks have at most {longest} blocks; give fewer"
            )
        inside = [site for name in routed for site in blocks_around(model, name)]
        names = {name: (start.name, end.name) for name, (start, end) in routed.items()}
        model.host.install(TokenRoute(names, ratio=self.ratio, seed=self.seed), inside)
        return Edit(
            tuple(site.name for site in inside),
            claims=tuple((f"{model.denoiser_name}.{site.name}", TOKENS) for site in inside),
        )

    def _ends(self, sites: list[Site]) -> tuple[Site, Site] | None:
        """The sites of the blocks after which tokens leave and come back."""
        end = len(sites) - self.last - 1
        return (sites[self.first - 1], sites[end]) if end >= self.first else None
