"""LongLoRA: LoRA for longer inputs (larger images, more tokens), trained with attention in shifted
groups and used with full attention.

Chen et al., arXiv 2309.12307. S2-Attn (section 3.2): tokens attend inside groups of G, in half of
the heads the groups begin G / 2 later. LoRA on q, k, v and out, and, which the paper finds to
matter (section 3.3), norms and embeddings trained whole: here the denoiser's own norms and its
embeddings of time, place and class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from trainer.methods.method import Edit
from trainer.methods.shared.lowrank import LowRank, edit_of
from trainer.methods.shared.options import SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Longlora(LowRank):
    """Options of `LowRank`; group: G as a share of the tokens up to 1, or as a number of them.

    whole: what of the denoiser trains without LoRA.

    Of the chosen sites, those of self-attention get the groups.
    """

    rank: int = Field(8, gt=0)
    alpha: float | None = Field(16.0, gt=0)
    sites: SiteSelector | None = "self"
    group: float = Field(0.25, gt=0)
    whole: tuple[Literal["norms", "embeddings"], ...] = ("norms", "embeddings")

    @field_validator("group")
    @classmethod
    def _share_or_number(cls, group: float) -> float:
        if group > 1 and group != int(group):
            raise ValueError("a share is at most 1, a number of tokens is whole")
        return group

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.adapters.inject import inject
        from trainer.ops.longlora import ShiftedSparse

        grouped = [
            site
            for site in require(model.sites, self.sites or "self", "sites")
            if site.kind == "self"
        ]
        if not grouped:
            raise ValueError(f"sites={self.sites} has no self-attention; choose self, or all")
        for site in grouped:
            if site.heads < 2:
                raise ValueError(f"{site.name} has one head, and half of the heads are shifted")
        targets = self.targets(model)
        whole = self._whole(model)
        trains = (*inject(model, targets, self.config, "longlora"), *whole)
        model.host.install(ShiftedSparse(self.group), grouped)
        kernels = [(f"{model.denoiser_name}.{site.name}", "the kernel") for site in grouped]
        return edit_of(targets, trains, also=kernels)

    def _whole(self, model: AttentionModel) -> list[str]:
        """Names of what trains whole; the layers that scale norms by the time are no norms."""
        found = []
        for name, layer in model.denoiser.named_modules():
            norm = "norms" in self.whole and "Norm" in type(layer).__name__
            if norm or ("embeddings" in self.whole and "embed" in name):
                path = f"{model.denoiser_name}.{name}"
                found += [f"{path}.{own}" for own, _ in layer.named_parameters(recurse=False)]
        return found
