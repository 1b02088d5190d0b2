"""Distillation of a site: the attention that replaced softmax attention learns what that did.

    L = weight * mean over sites of |y - y0|^2 / |y0|^2

y (b, n, c) is the output of the site, y0 its output before any training, on the same input.
The attention transfer of LoLCATs, arXiv 2410.10254, section 3.1, here on outputs after `to_out` and
relative to their size, so that sites weigh the same. Only y carries a gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention.native import attend, split_heads
from trainer.attention.op import Traits
from trainer.attention.projections import ROLES
from trainer.ops.temporal.frame_keys import FrameKeys

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.context import StepContext
    from trainer.attention.projections import Role
    from trainer.attention.sites import Site


class Distillation:
    """The loss over all sites; `weight` becomes 0 after the share `until` of the run."""

    def __init__(self, weight: float, until: float) -> None:
        self.full, self.until = weight, until
        self.done = 0.0
        self.terms: dict[str, tuple[StepContext, Tensor]] = {}
        self.closed: StepContext | None = None

    @property
    def weight(self) -> float:
        return self.full if self.done < self.until else 0.0

    def schedule(self, done: float) -> None:
        self.done = done

    def add(self, call: SiteCall, term: Tensor) -> None:
        """A forward that gradient checkpointing repeats after `loss` has been taken does not
        count."""
        if call.ctx is not self.closed:
            self.terms[call.site.name] = call.ctx, term

    def loss(self, step: object) -> Tensor:
        """The loss of the last forward; to be called once for each forward."""
        if not self.terms:
            return torch.zeros(())
        contexts, terms = zip(*self.terms.values(), strict=True)
        self.closed = contexts[-1]
        self.terms.clear()
        return self.weight * torch.stack(terms).mean()


class Original(nn.Module):
    """An op that holds a copy of the site's projections as it finds them, and compares.

    The copies are neither parameters, so that no method trains them and no adapter stores them, nor
    buffers, which DDP would send around before every step.
    """

    name = "original"
    traits = Traits(classic=True)

    def __init__(self, site: Site, distillation: Distillation) -> None:
        super().__init__()
        self.distillation = distillation
        self.layers: dict[Role, tuple[Tensor, Tensor | None]] = {}
        for role in ROLES:
            layer = site.projection(role)
            bias = None if layer.bias is None else layer.bias.detach().clone()
            self.layers[role] = layer.weight.detach().clone(), bias

    def tokens(self, x: Tensor, call: SiteCall) -> Tensor:
        learning = self.training and torch.is_grad_enabled() and self.distillation.weight > 0
        if learning:
            call.scratch(self)["x"] = x.detach()
        return x

    def context(self, k_ctx: Tensor, v_ctx: Tensor, call: SiteCall) -> tuple[Tensor, Tensor]:
        if "x" in (kept := call.scratch(self)):
            kept["contexts"] = k_ctx.detach(), v_ctx.detach()
        return k_ctx, v_ctx

    @torch.compiler.disable  # it hands a tensor to the loss of the step
    def restore(self, y: Tensor, call: SiteCall) -> Tensor:
        kept = call.scratch(self)
        if "x" in kept:
            wanted = self.as_before(kept["x"], kept["contexts"], call).float()
            size = wanted.square().mean().clamp(min=1e-12)
            self.distillation.add(call, (y.float() - wanted).square().mean() / size)
        return y

    @torch.no_grad()
    def as_before(self, x: Tensor, contexts: tuple[Tensor, Tensor], call: SiteCall) -> Tensor:
        """y0 (b, n, c). Where a method lets frames read the keys of other frames, so does y0."""
        site, (k_ctx, v_ctx) = call.site, contexts
        attn: Any = site.module
        if site.kind == "cross" and attn.norm_cross is not None:
            k_ctx, v_ctx = (attn.norm_encoder_hidden_states(c) for c in (k_ctx, v_ctx))
        q, k, v = split_heads(
            site,
            q=self._project("q", x),
            k=self._project("k", k_ctx),
            v=self._project("v", v_ctx),
        )
        for op in attn.processor.stages["kv"]:
            if isinstance(op, FrameKeys):
                q, k, v = op.kv(q, k, v, call=call)
        o = attend(site, q=q, k=k, v=v, mask=None)
        return self._project("out", o.transpose(1, 2).flatten(2))

    def _project(self, role: Role, x: Tensor) -> Tensor:
        weight, bias = self.layers[role]
        if weight.device != x.device:
            weight, bias = weight.to(x.device), None if bias is None else bias.to(x.device)
            self.layers[role] = weight, bias
        return F.linear(x, weight, bias)
