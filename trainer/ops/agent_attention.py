"""Agent attention in the place of a site's softmax attention, trained or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from trainer.attention.grid import token_grid
from trainer.attention.op import refuse_mask, refuse_other_keys
from trainer.kernels.agent import AgentBias, Shortcut, agent_attention, merged, num_merged, pooled
from trainer.kernels.softmax import softmax_attention

if TYPE_CHECKING:
    from trainer.attention.context import StepContext
    from trainer.attention.sites import Site


class PooledAgents(nn.Module):
    """A kernel op: agents are side * side means of the queries; a bias for both steps and a
    depthwise shortcut train."""

    name = owner = "agent_attention"
    masks = False
    more_keys = False
    swaps = True

    def __init__(self, site: Site, side: int) -> None:
        super().__init__()
        self.side = side
        self.of_keys = AgentBias(site.heads, side**2)
        self.of_queries = AgentBias(site.heads, side**2)
        self.shortcut = Shortcut(site.heads * site.head_dim)

    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, site: Site, ctx: StepContext
    ) -> Tensor:
        refuse_mask(mask, self, site)
        refuse_other_keys(q, k, self, site)
        grid = token_grid(q.shape[2], site, ctx, f"methods.{self.owner}")
        bias = self.of_keys(grid), self.of_queries(grid).transpose(1, 2)
        o = agent_attention(q, pooled(q, grid, self.side), k, v, site.scale, None, bias)
        return o + self.shortcut(v, grid)


class MergedAgents:
    """A kernel op: AgentSD, with agents from merged tokens; nothing trains.

    It runs in the first `share` of a sampler's steps and where it halves the tokens at least;
    elsewhere, and in a forward by itself, as in training, attention is softmax attention. There

        o = softmax(q a^T s^query_power) softmax(a k^T s) v + shortcut * v
    """

    name = owner = "agent_attention"
    masks = False
    more_keys = False

    def __init__(
        self,
        cell: int = 4,
        ratio: float = 0.95,
        share: float = 0.4,
        query_power: float = 0.3,
        shortcut: float = 0.075,
    ) -> None:
        self.cell, self.ratio, self.share = cell, ratio, share
        self.query_power, self.shortcut = query_power, shortcut
        self.x: Tensor | None = None

    def context(
        self, k_ctx: Tensor, v_ctx: Tensor, site: Site, ctx: StepContext
    ) -> tuple[Tensor, Tensor]:
        self.x = k_ctx if self.early(ctx) else None
        return k_ctx, v_ctx

    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, site: Site, ctx: StepContext
    ) -> Tensor:
        refuse_mask(mask, self, site)
        x, self.x = self.x, None
        scale = site.scale
        if x is None:
            return softmax_attention(q, k, v, None, scale)
        refuse_other_keys(q, k, self, site)
        grid = token_grid(q.shape[2], site, ctx, f"methods.{self.owner}")
        if 2 * num_merged(grid, self.cell, self.ratio) >= q.shape[2]:
            return softmax_attention(q, k, v, None, scale)
        agents = merged(q, x, grid, self.cell, self.ratio, seed=ctx.step)
        query_scale = (q.shape[-1] ** -0.5 if scale is None else scale) ** self.query_power
        return agent_attention(q, agents, k, v, scale, query_scale) + self.shortcut * v

    def early(self, ctx: StepContext) -> bool:
        return ctx.num_steps > 1 and ctx.step < self.share * ctx.num_steps
