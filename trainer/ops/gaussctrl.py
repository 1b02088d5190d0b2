"""GaussCtrl's attention: views of one scene are edited alike, since each also looks at reference
views.

    O = w Attn(Q, K, V) + (1 - w) mean_r Attn(Q, K_r, V_r)

Wu et al., ECCV 2024, arXiv 2403.08733, section 3.3 (attention-based latent code alignment); w = 0.6
in the released code, the references r the first rows of each half of guidance. Self-attention, all
steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.attention.op import Op, Traits
from trainer.attention.rows import TARGET_BRANCH
from trainer.kernels.softmax import softmax_attention
from trainer.ops.editing.installed import edited_sites, refuse_kernels
from trainer.ops.editing.step_window import Window, is_inside, refuse_empty

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.hooks import Sampler
    from trainer.attention.sites import Site


@dataclass(frozen=True)
class Alignment:
    """own: w; references: how many rows of each group are references."""

    owner: str
    sites: str
    own: float = 0.6
    references: int = 4
    steps: Window = (0.0, 1.0)


class AlignedViews:
    """An op of self-attention, put there while several pictures are sampled."""

    def __init__(self, told: Alignment) -> None:
        self.told = told
        self.name = f"{told.owner}_views"
        self.traits = Traits(owner=told.owner)

    def begin(self, sampler: Sampler) -> Mapping[Op, Sequence[Site]]:
        refuse_empty({"steps": self.told.steps}, sampler.steps)
        sites = edited_sites(sampler, self.told.sites, kinds=("self",), op=self)
        refuse_kernels(sampler, sites, self)
        return {self: sites}

    def end(self) -> None:
        pass

    @torch.compiler.disable  # it reads the step: compiled, every step would recompile
    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        if is_inside(self.told.steps, call.ctx):
            call.scratch(self)["kv"] = (k, v)
        return q, k, v

    @torch.compiler.disable
    def branch(self, o: Tensor, q: Tensor, call: SiteCall) -> Tensor:
        if "kv" not in call.scratch(self):
            return o
        k, v = call.scratch(self)["kv"]
        found = o.clone()
        for group in call.ctx.groups.groups:
            if group.branch == TARGET_BRANCH:
                rows = call.ctx.rows(group.name)
                seen = self._seen(q[rows], k[rows], v[rows], scale=call.scale)
                found[rows] = self.told.own * o[rows] + (1 - self.told.own) * seen
        return found

    def _seen(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
        """What all rows of a group (rows, heads, n, d) see of its references, on average."""
        count = min(self.told.references, len(k))
        each = [
            softmax_attention(q, k[r].expand_as(k), v[r].expand_as(v), scale=scale)
            for r in range(count)
        ]
        return torch.stack(each).mean(0)
