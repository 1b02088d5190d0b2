"""AID: pictures between two others, by attention that looks at both ends.

    outer  O = (1 - t) Attn(Q, K_1, V_1) + t Attn(Q, K_m, V_m)
    inner  O = Attn(Q, (1 - t) K_1 + t K_m, (1 - t) V_1 + t V_m)
    fused  the same with a picture's own keys and values appended to those of each end

He et al., arXiv 2403.17924, section 4, equations 5 to 8: the rows of a group are pictures from the
first end to the last, at shares t of a Beta prior; self- and cross-attention, conditional rows, the
first part of the steps. Noise is interpolated on the arc, text embeddings on the line. The ends
themselves never change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.attention.op import Op, Traits
from trainer.kernels.softmax import softmax_attention
from trainer.ops.editing.between import beta_shares, slerp
from trainer.ops.editing.installed import edited_sites, refuse_kernels
from trainer.ops.editing.step_window import Window, is_inside, refuse_empty
from trainer.ops.editing.word_reader import TARGET

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.condition import Condition
    from trainer.attention.hooks import Sampler
    from trainer.attention.rows import Rows
    from trainer.attention.sites import Site

INNER, OUTER = "inner", "outer"


@dataclass(frozen=True)
class Interpolation:
    """way: inner or outer; fused: whether own keys are appended; steps: when, None for no step;
    concentration: of the Beta prior."""

    owner: str
    sites: str
    way: str = OUTER
    fused: bool = True
    steps: Window | None = (0.0, 0.5)
    concentration: float = 1.0


class InterpolatedAttention:
    """An op of self- and cross-attention; its hooks interpolate noise and text."""

    def __init__(self, told: Interpolation) -> None:
        self.told = told
        self.name = f"{told.owner}_ends"
        self.traits = Traits(owner=told.owner)

    def begin(self, sampler: Sampler) -> Mapping[Op, Sequence[Site]]:
        refuse_empty({"steps": self.told.steps}, sampler.steps)
        if len(sampler.prompts) < 2:
            raise ValueError(
                "it makes pictures between two, and there is one prompt; give two, and how many "
                "pictures are between them, as in prompt=['a fox', 'a cat'] between=5"
            )
        sites = edited_sites(sampler, self.told.sites, kinds=("self", "cross"), op=self)
        refuse_kernels(sampler, sites, self)
        return {} if self.told.steps is None else {self: sites}

    def end(self) -> None:
        pass

    def shares(self, count: int) -> list[float]:
        return beta_shares(count, self.told.concentration)

    def start(self, x_t: Tensor, sampler: Sampler) -> tuple[Tensor, int]:
        """A hook of the sampler: noise (b, c, h, w) on the arc between the first and the last."""
        shares = self.shares(len(x_t))
        return torch.stack([slerp(x_t[0], x_t[-1], share) for share in shares]), 0

    def tells(self, condition: Condition, rows: Rows) -> Condition:
        """A hook of the sampler: text, as tokens (rows, n, d) and as a whole (rows, d'), on the
        line between that of the first and the last conditional row. Rows between see the tokens
        that either end sees."""
        own, mask = rows.find(TARGET), condition.mask
        if mask is not None:
            mask = mask.clone()
            mask[own.start + 1 : own.stop - 1] = torch.maximum(mask[own][0], mask[own][-1])
        tokens, pooled = (self._on_line(x, own) for x in (condition.tokens, condition.pooled))
        return replace(condition, tokens=tokens, pooled=pooled, mask=mask)

    def _on_line(self, x: Tensor | None, own: slice) -> Tensor | None:
        """x (rows, ..) with the rows `own` on the line between the first and the last of them."""
        if x is None:
            return None
        found, ends = x.clone(), (x[own][0], x[own][-1])
        for at, share in enumerate(self.shares(own.stop - own.start)):
            found[own.start + at] = (1 - share) * ends[0] + share * ends[1]
        return found

    @torch.compiler.disable  # it reads the step: compiled, every step would recompile
    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        if is_inside(self.told.steps, call.ctx) and TARGET in call.ctx.groups.slices:
            call.scratch(self)["kv"] = (k, v)
        return q, k, v

    @torch.compiler.disable
    def branch(self, o: Tensor, q: Tensor, call: SiteCall) -> Tensor:
        if "kv" not in call.scratch(self):
            return o
        own = call.ctx.rows(TARGET)
        k, v = (x[own] for x in call.scratch(self)["kv"])
        found, shares = o.clone(), self.shares(len(k))
        for row in range(1, len(k) - 1):
            found[own.start + row] = self._between(
                q[own][row], k, v, row=row, share=shares[row], scale=call.scale
            )
        return found

    def _between(
        self, q: Tensor, k: Tensor, v: Tensor, *, row: int, share: float, scale: float | None
    ) -> Tensor:
        """The output (heads, n, d) of a row whose queries q are; k, v (rows, heads, m, d)."""

        def attend(keys: Tensor, values: Tensor) -> Tensor:
            if self.told.fused:
                keys, values = torch.cat([keys, k[row]], 1), torch.cat([values, v[row]], 1)
            return softmax_attention(q[None], keys[None], values[None], scale=scale)[0]

        if self.told.way == INNER:
            keys, values = ((1 - share) * x[0] + share * x[-1] for x in (k, v))
            return attend(keys, values)
        return (1 - share) * attend(k[0], v[0]) + share * attend(k[-1], v[-1])
