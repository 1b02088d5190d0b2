"""What all methods that replace the softmax attention of sites have in common: which sites, and a
distillation from what they did before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from trainer.methods.method import Edit, Method
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.attention.sites import Site


class Swap(Method):
    """Methods that replace the softmax attention of sites. The projections around the new kernel
    train by another method: `selective` or `lora` on the same sites."""

    sites: SiteSelector = Field("self", description=f"the attention to replace: {SELECTOR}")
    distill: float = Field(
        0.0,
        ge=0,
        description="weight of a loss that compares the output of each site with what its softmax "
        "attention put out; 0 for none",
    )
    distill_until: float = Field(
        1.0, gt=0, le=1, description="share of the run's steps after which distill is 0"
    )

    def idle(self) -> dict[str, str]:
        return (
            {} if self.distill else {"distill_until": "distill=0 does not distill; give its weight"}
        )

    @property
    def reads_weights(self) -> bool:
        return self.distill > 0

    def swap(
        self,
        model: AttentionModel,
        op_of: Callable[[int, Site], Any],
        beside: Callable[[int, Site], Any] | None = None,
        *,
        finest: bool = False,
    ) -> Edit:
        """Installs `op_of(index, site)`, a kernel op, on every site, or on those with the finest of
        their grids, and with it the op of another stage that `beside` makes."""
        from torch import nn

        from trainer.ops.distillation import Distillation, Original

        sites = self._chosen(model, finest)
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

    def _chosen(self, model: AttentionModel, finest: bool) -> list[Site]:
        """The sites; finest: of those whose grids are known the finest, or all where none is.
        ValueError where one of them cannot be distilled."""
        from trainer.attention.sites import require

        sites = require(model.sites, self.sites, "sites")
        if finest:
            least = min((site.divisor for site in sites if site.divisor), default=None)
            sites = [site for site in sites if site.divisor == least]
        for site in sites:
            if self.distill and site.keeps_processor:
                raise ValueError(
                    f"distill compares with what classic attention puts out, and {site.name} is "
                    f"{type(site.module).__name__} with more than its projections; give distill=0"
                )
        return sites
