"""TF-ICON: an object of one picture is put into another, by self-attention whose scores are
composed of both.

    S[i, j] = S_background       i or j outside the box
              S_reference        i and j of the object
              (Q K_reference^T)  j of the object, i beside it in the box
              (Q K_reference^T)^T  i of the object, j beside it in the box
              S                  both beside it in the box

Lu, Liu and Kong, ICCV 2023, arXiv 2307.12493, section 3.3, before the softmax, in the first part of
the steps (tau_A); the last two are each other's transpose, as in the released code. Sampling begins
from the noise of both (section 3.2), and keeps the background outside the box for longer (tau_B).
Both are inverted under the "exceptional prompt" (section 3.1), in which every token is told the
same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.attention.bank import FeatureBank
from trainer.attention.op import Op, Traits
from trainer.kernels.softmax import attention_scores
from trainer.ops.editing.grid_masks import on_grid
from trainer.ops.editing.installed import edited_sites
from trainer.ops.editing.source_rows import halves
from trainer.ops.editing.step_window import Window, is_inside, refuse_empty

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.condition import Condition
    from trainer.attention.context import StepContext
    from trainer.attention.hooks import Prediction, Sampler
    from trainer.attention.sites import Site

BESIDE_SEED = 0  # of the noise in the box beside the object


def exceptional(condition: Condition) -> Condition:
    """A condition (b, n, d) in which every token is what its last one is, the padding's: no content
    and no order."""
    tokens = condition.tokens
    assert tokens is not None, "a model that reads text"
    return replace(condition, tokens=tokens[:, -1:].expand_as(tokens).clone())


@dataclass(frozen=True)
class Composition:
    """steps: of composed scores, None for none; background_until: the share of the steps until
    which the background is kept outside the box."""

    owner: str
    sites: str
    steps: Window | None = (0.0, 0.4)
    background_until: float = 0.8


class ComposedAttention:
    """An op of self-attention; `bank` keeps queries and keys of the object's picture."""

    def __init__(self, told: Composition, bank: FeatureBank) -> None:
        self.told, self.bank = told, bank
        self.name = f"{told.owner}_scores"
        self.traits = Traits(owner=told.owner, scores=True)
        self.mask: Tensor | None = None
        self.keeping = False
        self.used: dict[str, Tensor] = {}

    def begin(self, sampler: Sampler) -> Mapping[Op, Sequence[Site]]:
        told, steps = self.told, sampler.steps
        refuse_empty({"steps": told.steps}, steps)
        self.mask = sampler.mask("source")
        if self.mask is None:
            raise ValueError("it needs the mask of the object; give mask=<a picture>")
        if not _latent_mask(self.mask, sampler.reference[0]).any():
            raise ValueError(
                "the mask has no place that is white and as large as a latent; give one that is "
                "white where the object is"
            )
        self.used = {"box": box_of(self.mask > 0)[:, 0].float()}
        sites = edited_sites(sampler, told.sites, kinds=("self",), op=self)
        if told.steps is None:
            return {}
        self.keeping = True
        sampler.host.install(self, sites)
        try:
            window = told.steps
            chosen = [n for n in range(steps) if window[0] <= n / steps < window[1]]
            sampler.replay(chosen, reference=True)
        finally:
            self.keeping = False
            sampler.host.remove(self)
        return {self: sites}

    def end(self) -> None:
        self.mask = None
        self.bank.clear()

    def shown(self) -> dict[str, Tensor]:
        return self.used

    def start(self, x_t: Tensor, sampler: Sampler) -> tuple[Tensor, int]:
        """A hook of the sampler: the noise (b, c, h, w) of the background, of the object inside its
        mask, and new noise beside it in the box."""
        assert self.mask is not None
        mask = _latent_mask(self.mask, x_t)
        box = box_of(mask)
        drawn = torch.randn(x_t.shape[1:], generator=torch.Generator().manual_seed(BESIDE_SEED))
        inside = torch.where(mask, sampler.reference[0].to(x_t), drawn.to(x_t))
        return torch.where(box, inside, x_t), 0

    def gate(self, q: Tensor, call: SiteCall) -> bool:
        return not self.keeping and is_inside(self.told.steps, call.ctx)

    @torch.compiler.disable  # it reads the step: compiled, every step would recompile
    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        if self.keeping:
            self.bank.put(call.ctx.step, call.site.name, {"q": q, "k": k})
        else:
            call.scratch(self)["q"] = q
        return q, k, v

    @torch.compiler.disable
    def scores(self, scores: Tensor, call: SiteCall) -> Tensor:
        pairs = halves(call.ctx)
        if self.mask is None or not pairs:
            return scores
        grid = call.grid(scores.shape[2], f"methods.{self.told.owner}")
        object_ = on_grid(self.mask, grid, 1).view(1, 1, *grid)
        box = box_of(object_).flatten().to(scores.device)
        object_ = object_.flatten().to(scores.device)
        q = call.scratch(self)["q"]
        kept = self.bank.get(call.ctx.step, call.site.name, like=q)
        reference = attention_scores(kept["q"], kept["k"], call.scale)
        found = scores.clone()
        for source, own in pairs:
            crossed = attention_scores(q[own], kept["k"], call.scale)
            parts = (scores[source], reference, crossed, scores[own])
            found[own] = composed(parts, object_, box)
        return found

    def after_step(self, x_t: Tensor, prediction: Prediction, ctx: StepContext) -> Tensor:
        """A hook of the sampler: x_t (b, c, h, w), the background outside the box."""
        x_s = prediction.source
        if self.mask is None or x_s is None:
            return x_t
        if ctx.step >= self.told.background_until * ctx.num_steps:
            return x_t
        return torch.where(box_of(_latent_mask(self.mask, x_t)), x_t, x_s)


def composed(parts: tuple[Tensor, Tensor, Tensor, Tensor], object_: Tensor, box: Tensor) -> Tensor:
    """Scores (rows, heads, n, n) of those of the background, the reference, the queries to the
    reference's keys, and the edit's own; object_, box (n,) of bool."""
    background, reference, crossed, own = parts
    query, key = object_[:, None], object_[None]
    inside = torch.where(key, crossed, own)
    inside = torch.where(query, crossed.transpose(-2, -1), inside)
    inside = torch.where(query & key, reference, inside)
    return torch.where(box[:, None] & box[None], inside, background)


def box_of(mask: Tensor) -> Tensor:
    """The rectangle around a mask (1, 1, h, w) of bool."""
    rows, columns = mask.any(-1)[0, 0].nonzero(), mask.any(-2)[0, 0].nonzero()
    found = torch.zeros_like(mask)
    if len(rows):
        top, left = int(rows[0]), int(columns[0])
        found[..., top : int(rows[-1]) + 1, left : int(columns[-1]) + 1] = True
    return found


def _latent_mask(mask: Tensor, x_t: Tensor) -> Tensor:
    return (F.adaptive_avg_pool2d(mask, (x_t.shape[-2], x_t.shape[-1])) >= 0.5).to(x_t.device)
