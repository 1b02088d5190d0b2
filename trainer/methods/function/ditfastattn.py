"""DiTFastAttn: while sampling, attention repeats what it computed before: the output of the step
before, that of the other half of guidance, or what tokens outside a window add.

    reuse: o_t = o_(t+1)    half: o(no prompt) = o(prompt)    window: o = o_window + R

R = o_full - o_window at the last full step. Yuan et al., arXiv 2406.08552. Which layer does what at
which step is found once by a greedy search and kept in a small file:

    python -m trainer calibrate recipe=ditfastattn out=plan.json
    python -m trainer sample backbone=tiny_dit methods.ditfastattn.plan=plan.json prompt="a fox"

It trains nothing; outside a sampler attention is what it was.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from trainer.methods.method import Calibration, Edit, EditKind, Method
from trainer.methods.shared.attention_plan import AttentionPlan, weight_sizes
from trainer.methods.shared.kernel import installed
from trainer.methods.shared.options import SELECTOR, SiteSelector
from trainer.ops.reduction.choices import Choice, share_of_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.attention.hooks import Sampler
    from trainer.attention.model import AttentionModel
    from trainer.attention.sites import Site
    from trainer.ops.reduction.ditfastattn import SharedAttention
    from trainer.ops.reduction.plan_search import PlanSearch


class Ditfastattn(Method):
    """Where attention is shared, and by which plan."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "DiTFastAttn"
    paper: ClassVar[str] = "arXiv 2406.08552"
    calibrates: ClassVar[bool] = True
    when_sampling: ClassVar[frozenset[str]] = frozenset({"plan", "pattern"})

    sites: SiteSelector = Field("self", description=f"attention that is shared: {SELECTOR}")
    plan: Path | None = Field(
        None, description="a file of `calibrate`; null does what pattern says at every site"
    )
    pattern: tuple[Choice, ...] = Field(
        ("full", "reuse"),
        min_length=1,
        description="without a plan, what every site does at steps one after another, again and "
        "again: full, half (of guidance), window, window_half, reuse; the first step is full",
    )
    window: float = Field(
        0.125, gt=0, le=1, description="share of the tokens that a window has, around each token"
    )
    threshold: float = Field(
        0.1,
        ge=0,
        description="for `calibrate`: how much the output of the denoiser may change, relatively, "
        "at its last layer; less at the first ones",
    )

    @model_validator(mode="after")
    def _computes_something(self) -> Ditfastattn:
        if self.plan is None and self.pattern[0] == "reuse":
            raise ValueError("pattern begins with reuse, and there is nothing yet; begin with full")
        return self

    def idle(self) -> dict[str, str]:
        if self.plan is None:
            return {}
        why = "the plan says it; it is for no plan"
        return {"pattern": why, "window": why, "threshold": "it is for `calibrate`"}

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.hooks import SamplingHook
        from trainer.attention.sites import require
        from trainer.ops.reduction.ditfastattn import SharedAttention
        from trainer.ops.reduction.plan_search import PlanSearch

        sites = require(model.sites, self.sites, "sites")
        for site in sites:
            if site.kind != "self":
                raise ValueError(f"{site.name} is {site.kind}-attention; choose sites=self")
        plan = None if self.plan is None else AttentionPlan.read(self.plan)
        if plan is not None and self.plan is not None:
            plan.check(type(model.denoiser).__name__, sites, self.plan)
        op = SharedAttention(
            {} if plan is None else plan.sites, plan.window if plan else self.window
        )
        names = [site.name for site in sites]
        for name in names if plan is None else ():
            op.rules[name] = list(self.pattern)

        def begin(sampler: Sampler) -> None:
            if plan is not None and sampler.steps != plan.steps:
                raise ValueError(
                    f"methods.{self.name}: plan={self.plan} is for {plan.steps} steps, and "
                    f"{sampler.steps} are taken; give steps={plan.steps}, or make another plan"
                )
            if plan is None:
                for name in names:
                    op.rules[name] = repeated(self.pattern, sampler.steps)
            op.begin(sampler)

        search = PlanSearch(op, names, self.threshold)
        return replace(
            installed(model, op, sites),
            sampling=(SamplingHook(open=begin, close=op.forget),),
            calibration=Calibration(
                SamplingHook(open=search.begin, before_step=search.before_step, close=search.end),
                lambda path: self._written(path, model=model, search=search, sites=sites),
            ),
        )

    def _written(
        self, path: Path, *, model: AttentionModel, search: PlanSearch, sites: Sequence[Site]
    ) -> str:
        """Writes what a search has found, and says how much attention is left."""
        left = attention_left(search.op, sites)
        plan = AttentionPlan(
            denoiser=type(model.denoiser).__name__,
            steps=search.steps,
            guided=search.guided,
            window=self.window,
            threshold=self.threshold,
            sites={name: tuple(rule) for name, rule in search.op.rules.items()},
            weights=weight_sizes(sites),
            attention_flop=round(left, 6),
        )
        plan.write(path)
        return f"{path}: {100 * (1 - left):.1f} % of the FLOP of attention at its sites are saved"


def repeated(pattern: Sequence[Choice], steps: int) -> list[Choice]:
    """A pattern for so many steps."""
    return [pattern[step % len(pattern)] for step in range(steps)]


def attention_left(op: SharedAttention, sites: Sequence[Site]) -> float:
    """The share of the FLOP of q k^T and its product with v that an op's rules leave at its sites,
    whose tokens are as many as their grids are fine."""
    done = whole = 0.0
    for site in sites:
        weight = site.heads * site.head_dim / (site.divisor or 1) ** 4
        for step, choice in enumerate(op.rules[site.name]):
            done += weight * share_of_attention(choice if step else "full", op.window)
            whole += weight
    return done / whole
