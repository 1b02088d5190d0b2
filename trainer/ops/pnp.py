"""Plug-and-Play: the self-attention maps and residual features of an edit are those of its source,
so that the layout stays and all else follows the prompt.

    A = softmax(Q_s K_s^T / sqrt(d)),  f = f_s    values are the edit's own

Tumanyan et al., CVPR 2023, arXiv 2211.12572, section 4, algorithm 1: Q and K of the decoder's
self-attention in the first part of the steps (tau_A), the features of one residual block of the
decoder in a longer one (tau_f). The source's rows are the latents of its inversion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.attention.op import Op, Traits
from trainer.ops.editing.installed import edited_sites, hooked_features
from trainer.ops.editing.source_rows import halves, with_source
from trainer.ops.editing.step_window import Window, is_inside, refuse_empty

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.context import StepContext
    from trainer.attention.hooks import Sampler
    from trainer.attention.residual_blocks import ResidualBlock
    from trainer.attention.sites import Site


@dataclass(frozen=True)
class Injection:
    """sites, steps: whose queries and keys are the source's, and when; features, feature_steps:
    selectors of residual blocks, likewise; None for no step."""

    owner: str
    sites: str
    steps: Window | None = (0.0, 0.5)
    features: str = "up"
    feature_steps: Window | None = (0.0, 0.8)


class PlugAndPlay:
    """An op of self- and joint attention and a change of residual blocks, while an edit is
    sampled."""

    def __init__(self, told: Injection) -> None:
        self.told = told
        self.name = f"{told.owner}_injection"
        self.traits = Traits(owner=told.owner)
        self.handles: list[Any] = []

    def begin(self, sampler: Sampler) -> Mapping[Op, Sequence[Site]]:
        told = self.told
        refuse_empty({"steps": told.steps, "feature_steps": told.feature_steps}, sampler.steps)
        sites = edited_sites(sampler, told.sites, kinds=("self", "joint"), op=self)
        if told.feature_steps is not None:
            self.handles = hooked_features(sampler, told.features, self.features)
        return {self: sites} if told.steps is not None else {}

    def end(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @torch.compiler.disable  # it reads the step: compiled, every step would recompile
    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        pairs = halves(call.ctx) if is_inside(self.told.steps, call.ctx) else []
        if not pairs:
            return q, k, v
        queries = call.spans(q.shape[2]).image
        keys = call.spans(k.shape[2], keys=True).image
        return with_source(q, pairs, queries), with_source(k, pairs, keys), v

    @torch.compiler.disable
    def features(self, made: Tensor, block: ResidualBlock, ctx: StepContext) -> Tensor:
        """What a residual block makes (b, c, h, w), that of the source in the edit's rows."""
        if not is_inside(self.told.feature_steps, ctx):
            return made
        found = made.clone()
        for source, own in halves(ctx):
            found[own] = made[source]
        return found
