"""What all methods that replace the softmax attention of sites have in common: which sites, and a
distillation from what they did before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainer.methods.method import Edit, Method
from trainer.methods.shared.options import SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.attention.sites import Site


class Swap(Method):
    """sites: a selector; distill: weight of a loss that compares what a site puts out to what it
    put out before, 0 for none; distill_until: the share of the run's steps after which it is 0.

    The projections around the new kernel train by another method: `selective` or `lora` on the same
    sites.
    """

    kind: ClassVar[Literal["attention"]] = "attention"
    sites: SiteSelector = "self"
    distill: float = Field(0.0, ge=0)
    distill_until: float = Field(1.0, gt=0, le=1)

    def swap(
        self,
        model: AttentionModel,
        op_of: Callable[[int, Site], Any],
        beside: Callable[[int, Site], Any] | None = None,
    ) -> Edit:
        """Puts `op_of(index, site)`, a kernel op, on every site, and with it what `beside` makes,
        an op of another stage."""
        from torch import nn

        from trainer.attention.sites import require
        from trainer.ops.distillation import Distillation, Original

        sites = require(model.sites, self.sites, "sites")
        distillation = Distillation(self.distill, self.distill_until) if self.distill else None
        trains: list[str] = []
        for index, site in enumerate(sites):
            for op in [op_of(index, site), *([beside(index, site)] if beside else ())]:
                model.host.install(op, [site])
                if isinstance(op, nn.Module):
                    path = f"{model.denoiser_name}.{site.name}.{op.name}"
                    trains += [f"{path}.{name}" for name, _ in op.named_parameters()]
            if distillation is not None:
                model.host.install(Original(site, distillation), [site])
        return Edit(
            sites=tuple(site.name for site in sites),
            claims=(
                *((f"{model.denoiser_name}.{site.name}", "the kernel") for site in sites),
                *((name, "weight") for name in trains),
            ),
            trains=tuple(trains),
            loss=None if distillation is None else distillation.loss,
            schedule=None if distillation is None else distillation.schedule,
        )
