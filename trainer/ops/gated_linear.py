"""Gated linear attention instead of a site's softmax attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention.op import Traits, label
from trainer.attention.op_conflicts import refuse_mask, refuse_other_keys
from trainer.kernels.gated_linear import ORDERS, gated_attention, ordered, restored
from trainer.kernels.linear_attention import at_least_float32

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.sites import Site

OPEN = 1.278465  # swish of it is 1


class GatedLinearOp(nn.Module):
    """A kernel op: GLA with the site's own q, k and v, the mean over scans in `orders`.

        g = log sigmoid(x W1 W2 + b) / tau,  o <- swish(x Wr + br) (.) RMSNorm(o)

    arXiv 2312.06635, section 4.4; W1 has `rank` columns. br, which the paper has not, lets the
    output through unchanged at the start, where Wr is zero.
    """

    name = "gated_linear"
    traits = Traits(owner="gated_linear", masks=False, more_keys=False, swaps=True, grid=True)

    def __init__(self, site: Site, orders: Sequence[str], rank: int = 16, tau: float = 16) -> None:
        super().__init__()
        assert set(orders) <= set(ORDERS)
        self.orders, self.tau = tuple(orders), tau
        width, inner = site.projection("q").in_features, site.heads * site.head_dim
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, inner)
        self.norm = nn.RMSNorm(site.head_dim, eps=1e-6)
        self.let = nn.Linear(width, inner)
        nn.init.zeros_(self.let.weight)
        nn.init.constant_(self.let.bias, OPEN)

    def context(self, k_ctx: Tensor, v_ctx: Tensor, call: SiteCall) -> tuple[Tensor, Tensor]:
        call.scratch(self)["x"] = k_ctx
        return k_ctx, v_ctx

    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: SiteCall
    ) -> Tensor:
        refuse_mask(mask, self, call)
        refuse_other_keys(q, k, op=self, call=call)
        x = call.scratch(self)["x"]  # `context` ran just before
        grid = call.grid(q.shape[2], label(self))
        g = F.logsigmoid(at_least_float32(self.up(self.down(x)))) / self.tau
        g, let = (t.unflatten(-1, (call.site.heads, -1)).transpose(1, 2) for t in (g, self.let(x)))
        scans = [self.scan((q, k, v, g), order, grid) for order in self.orders]
        o = sum(scans[1:], scans[0]) / len(scans)
        normed: Tensor = self.norm(at_least_float32(o))
        return (F.silu(at_least_float32(let)) * normed).to(v.dtype)

    def scan(
        self, qkvg: tuple[Tensor, Tensor, Tensor, Tensor], order: str, grid: tuple[int, int]
    ) -> Tensor:
        q, k, v, g = (ordered(t, order, grid) for t in qkvg)
        return restored(gated_attention(q, k, v, g=g), order, grid)
