"""FEC: an edit of a real picture in which all that the prompt does not change is the picture again,
without any tuning.

    reference   source rows z*_t, K, V of the edit those of the source
    noise       x_(t-1) <- x_(t-1) + (z*_(t-1) - x_source_(t-1))    the source guided from z*_t,
                K, V of the edit those of the source
    kv-reuse    K, V of the edit those kept while the network saw z*_t

arXiv 2309.14934, where z*_t is the trajectory of DDIM inversion: three ways by which a prompt that
is the source's gives the picture exactly, whatever the guidance and the number of steps. The
paper's code is not public; its schemes are read here as these equations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.attention.bank import FeatureBank
from trainer.attention.op import Op, Traits
from trainer.ops.editing.installed import edited_sites
from trainer.ops.editing.source_rows import halves, with_source
from trainer.ops.editing.step_window import Window, is_inside, refuse_empty

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.context import StepContext
    from trainer.attention.hooks import Prediction, Sampler
    from trainer.attention.sites import Site

REFERENCE, NOISE, REUSE = "reference", "noise", "kv-reuse"


@dataclass(frozen=True)
class Consistency:
    """scheme: of the three; sites, steps: whose keys and values are the source's, and when."""

    owner: str
    sites: str
    scheme: str = REFERENCE
    steps: Window | None = (0.0, 1.0)


class Consistent:
    """An op of self- and joint attention; `bank` keeps keys and values of the inversion."""

    def __init__(self, told: Consistency, bank: FeatureBank) -> None:
        self.told, self.bank = told, bank
        self.name = f"{told.owner}_keys"
        self.traits = Traits(owner=told.owner)
        self.keeping = False

    def begin(self, sampler: Sampler) -> Mapping[Op, Sequence[Site]]:
        told = self.told
        refuse_empty({"steps": told.steps}, sampler.steps)
        sites = edited_sites(sampler, told.sites, kinds=("self", "joint"), op=self)
        if told.steps is None:
            return {}
        if told.scheme == REUSE:
            self._keep(sampler, sites)
        return {self: sites}

    def _keep(self, sampler: Sampler, sites: Sequence[Site]) -> None:
        """Fills the bank with the keys and values of the inversion."""
        window, steps = self.told.steps, sampler.steps
        assert window is not None
        self.keeping = True
        sampler.host.install(self, sites)
        try:
            sampler.replay([n for n in range(steps) if window[0] <= n / steps < window[1]])
        finally:
            self.keeping = False
            sampler.host.remove(self)

    def end(self) -> None:
        self.bank.clear()

    @torch.compiler.disable  # it reads the step: compiled, every step would recompile
    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        ctx, place = call.ctx, call.site.name
        if not is_inside(self.told.steps, ctx):
            return q, k, v
        image = call.spans(k.shape[2], keys=True).image
        if self.keeping:
            if self.bank.takes(q.shape[2]):
                self.bank.put(ctx.step, place, {"k": k[:, :, image], "v": v[:, :, image]})
            return q, k, v
        pairs = halves(ctx)
        if self.told.scheme != REUSE:
            return q, with_source(k, pairs, image), with_source(v, pairs, image)
        if not self.bank.takes(q.shape[2]):
            return q, k, v
        kept = self.bank.get(ctx.step, place, like=k)
        return q, _reused(k, kept["k"], call), _reused(v, kept["v"], call)

    def after_step(self, x_t: Tensor, prediction: Prediction, ctx: StepContext) -> Tensor:
        """A hook of the sampler: x_t (b, c, h, w) with what the step has lost of the source."""
        if self.told.scheme != NOISE or prediction.source is None:
            return x_t
        assert prediction.made_source is not None
        return x_t + (prediction.source - prediction.made_source)


def _reused(x: Tensor, kept: Tensor, call: SiteCall) -> Tensor:
    """x (rows, heads, m, d) with the image tokens kept of one picture in the edit's rows."""
    image = call.spans(x.shape[2], keys=True).image
    found = x.clone()
    for _, own in halves(call.ctx):
        found[own, :, image] = kept
    return found
