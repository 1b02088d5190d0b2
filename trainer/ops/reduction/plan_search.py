"""The greedy search of DiTFastAttn: at every step of a sampler, layer after layer, the cheapest way
to attend that leaves the output of the denoiser nearly as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.ops.reduction.choices import HALVES, TRIED, Choice

if TYPE_CHECKING:
    from trainer.attention.context import StepContext
    from trainer.attention.hooks import Predict, Sampler
    from trainer.ops.reduction.ditfastattn import SharedAttention


class PlanSearch:
    """Chooses for `op` at the sites named, in their order, while a sampler runs. The choice i of m
    is taken where the relative change of the denoiser's output is below (i + 1) / m * threshold.
    """

    def __init__(self, op: SharedAttention, sites: Sequence[str], threshold: float) -> None:
        self.op, self.sites, self.threshold = op, list(sites), threshold
        self.steps, self.guided = 0, False

    def begin(self, sampler: Sampler) -> None:
        self.op.forget()
        self.op.always = True
        self.steps = sampler.steps
        for name in self.sites:
            self.op.rules[name] = ["full"] * sampler.steps

    def before_step(self, x_t: Tensor, predict: Predict, ctx: StepContext) -> Tensor:
        """Chooses for this step; the sampler's own call of the denoiser then runs with it."""
        self.guided = len(ctx.groups.groups) == 2
        if ctx.step == 0:
            return x_t
        self.op.keeps = False
        try:
            for name in self.sites:
                self.op.rules[name][ctx.step] = "full"
            whole = _output(predict, x_t)
            for index, name in enumerate(self.sites):
                limit = (index + 1) / len(self.sites) * self.threshold
                self.op.rules[name][ctx.step] = self._first_below(
                    limit, (name, ctx.step), whole=whole, predict=lambda: _output(predict, x_t)
                )
        finally:
            self.op.keeps = True
        return x_t

    def end(self, sampler: Sampler) -> None:
        self.op.always = False
        self.op.forget()

    def _first_below(
        self,
        limit: float,
        place: tuple[str, int],
        *,
        whole: Tensor,
        predict: Callable[[], Tensor],
    ) -> Choice:
        name, step = place
        for choice in TRIED:
            if choice in HALVES and not self.guided:
                continue
            self.op.rules[name][step] = choice
            if relative_change(whole, predict()) < limit:
                return choice
        return "full"


def relative_change(a: Tensor, b: Tensor) -> float:
    """mean(min(|a - b| / (max(|a|, |b|) + 1e-6), 10)). The authors' code has max(a, b), by which a
    change of negative values counts too much."""
    largest = torch.maximum(a.abs(), b.abs()) + 1e-6
    return float(((a - b).abs() / largest).clamp(max=10).mean())


def _output(predict: Predict, x_t: Tensor) -> Tensor:
    """The output of all rows, before guidance."""
    return torch.cat(list(predict(x_t).outputs.values()))
