"""Tokens that matter least are left out of the later blocks of a stack, and recovered at its
end."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.attention.op import Traits
from trainer.kernels.page_rank import attention_map, donors, page_rank
from trainer.ops.reduction.stacks import OfOneCall, stack_of

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.context import StepContext


@dataclass(frozen=True)
class Pruned:
    """kept (b, k): positions of the tokens that stay, ascending; source (b, n): for every token the
    place among these of the one that it gets back."""

    kept: Tensor
    source: Tensor

    def drop(self, x: Tensor) -> Tensor:
        """(b, n, c) to (b, k, c)."""
        return x.gather(1, self.kept[..., None].expand(-1, -1, x.shape[2]))

    def recover(self, y: Tensor) -> Tensor:
        """(b, k, c) to (b, n, c)."""
        return y.gather(1, self.source[..., None].expand(-1, -1, y.shape[2]))


class TokenPruning:
    """An op on all attention of stacks of blocks. The first block of a stack ranks and, after
    its feed-forward layer, drops tokens; the last one recovers them.

    ends: for each stack, the names of its first and last site; early: stacks that drop nothing in
    the first `dense` of a sampler's steps.
    """

    name = "at_edm"
    traits = Traits(owner=name, resizes=True, softmax=True)

    def __init__(
        self,
        ends: Mapping[str, tuple[str, str]],
        early: Collection[str],
        *,
        ratio: float,
        dense: float,
        stride: int,
        iterations: int,
    ) -> None:
        self.ends, self.early, self.ratio, self.dense = ends, early, ratio, dense
        self.stride, self.iterations = stride, iterations
        self.pruned: OfOneCall[Pruned] = OfOneCall()

    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        stack = stack_of(call.site)
        if call.site.name == self.ends[stack][0] and self._prunes(stack, call.ctx):
            with torch.no_grad():
                plan = self._ranked(q, k, call.scale)
            if plan is not None:
                self.pruned.put(call.ctx, stack, plan)
        return q, k, v

    def block(self, x: Tensor, call: SiteCall) -> Tensor:
        stack = stack_of(call.site)
        plan = self.pruned.get(call.ctx, stack)
        if plan is None:
            return x
        if call.site.name == self.ends[stack][0]:
            return plan.drop(x)
        return plan.recover(x) if call.site.name == self.ends[stack][1] else x

    def _prunes(self, stack: str, ctx: StepContext) -> bool:
        sampled = ctx.num_steps > 1 and not ctx.training
        return not (sampled and stack in self.early and ctx.step < self.dense * ctx.num_steps)

    def _ranked(self, q: Tensor, k: Tensor, scale: float | None) -> Pruned | None:
        tokens = q.shape[2]
        count = tokens - int(self.ratio * tokens)
        if count == tokens:
            return None
        a = attention_map(q, k[:, :, :tokens], scale, stride=self.stride)
        s = page_rank(a, stride=self.stride, iterations=self.iterations)
        order = s.argsort(dim=-1, descending=True, stable=True)
        kept, left = order[:, :count].sort().values, order[:, count:].sort().values
        source = torch.empty_like(order)
        places = torch.arange(count, device=order.device).expand(len(order), -1)
        source.scatter_(1, kept, places)
        source.scatter_(1, left, donors(q, k, kept=kept, left=left))
        return Pruned(kept, source)
