"""Agent attention instead of a site's softmax attention, trained or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from trainer.attention.op import Traits, label
from trainer.attention.op_conflicts import refuse_mask, refuse_other_keys
from trainer.kernels.agent_attention import agent_attention, pooled
from trainer.kernels.softmax import softmax_attention
from trainer.kernels.token_merging import Groups, joined_heads, match, num_merged, split_again
from trainer.ops.grid_modules import AgentBias, Shortcut

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.context import StepContext
    from trainer.attention.sites import Site


class PooledAgents(nn.Module):
    """A kernel op: agents are side * side means of the queries; a bias for both steps and a
    depthwise shortcut train."""

    name = "agent_attention"
    traits = Traits(owner="agent_attention", masks=False, more_keys=False, swaps=True, grid=True)

    def __init__(self, site: Site, side: int) -> None:
        super().__init__()
        self.side = side
        self.of_keys = AgentBias(site.heads, side**2)
        self.of_queries = AgentBias(site.heads, side**2)
        self.shortcut = Shortcut(site.heads * site.head_dim)

    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: SiteCall
    ) -> Tensor:
        refuse_mask(mask, self, call)
        refuse_other_keys(q, k, op=self, call=call)
        grid = call.grid(q.shape[2], label(self))
        bias = self.of_keys(grid), self.of_queries(grid).transpose(1, 2)
        o = agent_attention(q, pooled(q, grid, self.side), k, v=v, scale=call.scale, bias=bias)
        return o + self.shortcut(v, grid)


class MergedAgents:
    """A kernel op: AgentSD; nothing trains.

    In every step of a sampler, `merge` of the tokens are averaged into others like them, attention
    is over what is left, and each merged token gets its target's output. Averaging queries, keys
    and values is the same as projecting averaged inputs. In the first `share` of the steps, where
    it at least halves the tokens, attention is through agents, the queries after more merging:

        o = softmax(q a^T s^query_power) softmax(a k^T s) v + shortcut * v

    In a forward outside a sampler, as in training, it is softmax attention of all tokens.
    """

    name = "agent_attention"
    traits = Traits(owner="agent_attention", masks=False, more_keys=False, grid=True)

    def __init__(
        self,
        cell: int = 4,
        ratio: float = 0.95,
        share: float = 0.4,
        *,
        query_power: float = 0.3,
        shortcut: float = 0.075,
        merge: float = 0.4,
        later_cell: int = 2,
    ) -> None:
        self.cell, self.ratio, self.share = cell, ratio, share
        self.query_power, self.shortcut = query_power, shortcut
        self.merge, self.later_cell = merge, later_cell

    def context(self, k_ctx: Tensor, v_ctx: Tensor, call: SiteCall) -> tuple[Tensor, Tensor]:
        if call.ctx.num_steps > 1:
            call.scratch(self)["x"] = k_ctx
        return k_ctx, v_ctx

    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: SiteCall
    ) -> Tensor:
        refuse_mask(mask, self, call)
        x, early = call.scratch(self).get("x"), self.early(call.ctx)
        if x is None or not (early or self.merge):
            return softmax_attention(q, k, v, scale=call.scale)
        refuse_other_keys(q, k, op=self, call=call)
        grid = call.grid(q.shape[2], label(self))
        cell = self.cell if early else self.later_cell
        found = match(x, grid, cell=cell, seed=call.ctx.step)
        left = num_merged(grid, cell, self.merge)
        agents = None
        if early and 2 * num_merged(grid, cell, self.ratio) < left:
            agents = _merged(found.groups(self.ratio), q)
        if left == q.shape[2]:
            return self._attend((q, k, v), agents, call.scale)
        groups = found.groups(self.merge)
        merged = _merged(groups, q), _merged(groups, k), _merged(groups, v)
        o = self._attend(merged, agents, call.scale)
        return split_again(groups.unmerge(joined_heads(o)), q.shape[1])

    def _attend(
        self, qkv: tuple[Tensor, Tensor, Tensor], agents: Tensor | None, scale: float | None
    ) -> Tensor:
        q, k, v = qkv
        if agents is None:
            return softmax_attention(q, k, v, scale=scale)
        query_scale = (q.shape[-1] ** -0.5 if scale is None else scale) ** self.query_power
        o = agent_attention(q, agents, k, v=v, scale=scale, query_scale=query_scale)
        return o + self.shortcut * v

    def early(self, ctx: StepContext) -> bool:
        return ctx.num_steps > 1 and ctx.step < self.share * ctx.num_steps


def _merged(groups: Groups, x: Tensor) -> Tensor:
    """(b, h, n, d) to (b, h, m, d), the same groups in every head."""
    return split_again(groups.merge(joined_heads(x)), x.shape[1])
