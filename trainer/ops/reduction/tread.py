"""Tokens that pass some blocks by, in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.attention.op import Traits
from trainer.ops.reduction.stacks import OfOneCall, stack_of
from trainer.ops.reduction.tome import draw_of

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall


class TokenRoute:
    """An op on all attention of stacks of blocks. After the block of one site, random tokens,
    others in every row, are put aside; after that of a later one they come back as they were. In
    training alone.

    ends: for each stack, the names of these two sites.
    """

    name = "tread"
    traits = Traits(owner=name, resizes=True, hands_over=True)

    def __init__(self, ends: Mapping[str, tuple[str, str]], *, ratio: float, seed: int) -> None:
        self.ends, self.ratio, self.seed = ends, ratio, seed
        self.aside: OfOneCall[tuple[Tensor, Tensor]] = OfOneCall()

    def block(self, x: Tensor, call: SiteCall) -> Tensor:
        stack = stack_of(call.site)
        first, last = self.ends[stack]
        named = call.site.name in (first, last)
        if not (named and call.ctx.training) or int(self.ratio * x.shape[1]) == 0:
            return x
        if call.site.name == first:
            stays = self._stays(x, call)
            self.aside.put(call.ctx, stack, (x, stays))
            return x.gather(1, stays[..., None].expand(-1, -1, x.shape[2]))
        found = self.aside.take(call.ctx, stack)
        assert found is not None, "the block after which tokens leave did not run"
        whole, stays = found
        return whole.scatter(1, stays[..., None].expand(-1, -1, x.shape[2]), x)

    def _stays(self, x: Tensor, call: SiteCall) -> Tensor:
        """Positions (b, k) of the tokens that go through the blocks, ascending."""
        generator = torch.Generator().manual_seed(draw_of(self.seed, call.ctx))
        count = x.shape[1] - int(self.ratio * x.shape[1])
        drawn = torch.rand(x.shape[:2], generator=generator).argsort(dim=-1)[:, :count]
        return drawn.sort().values.to(x.device)
