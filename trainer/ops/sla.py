"""Sparse-linear attention in place of a site's softmax attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from trainer.attention.op import Traits
from trainer.attention.op_conflicts import refuse_mask, refuse_other_keys
from trainer.kernels.sla import Shares, sparse_and_linear
from trainer.kernels.softmax import softmax_attention

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.sites import Site


class SparseLinear(nn.Module):
    """A kernel op: o = o_sparse + W o_linear + b of each head; W and b train, from zero, where
    attention is to the critical blocks alone."""

    name = "sla"
    traits = Traits(owner="sla", masks=False, more_keys=False, swaps=True)

    def __init__(self, site: Site, shares: Shares) -> None:
        super().__init__()
        self.shares = shares
        self.of_linear = nn.Linear(site.head_dim, site.head_dim)
        for parameter in self.of_linear.parameters():
            nn.init.zeros_(parameter)

    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: SiteCall
    ) -> Tensor:
        refuse_mask(mask, self, call)
        refuse_other_keys(q, k, op=self, call=call)
        blocks = -(-q.shape[2] // self.shares.size)
        if self.shares.critical == 1:
            return softmax_attention(q, k, v, scale=call.scale)
        if blocks == 1:
            raise ValueError(
                f"methods.sla has one block of {self.shares.size} tokens at {call.site.name!r}, "
                f"which has {q.shape[2]}, and skips nothing; give a smaller block, or other sites"
            )
        exact, linear = sparse_and_linear(q, k, v, shares=self.shares, scale=call.scale)
        added: Tensor = self.of_linear(linear.to(self.of_linear.weight.dtype))
        return exact + added.to(exact.dtype)
