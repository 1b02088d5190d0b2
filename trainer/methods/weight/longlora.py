"""LongLoRA: LoRA for longer inputs (larger images, more tokens), trained with attention in shifted
groups and used with full attention.

Chen et al., arXiv 2309.12307. S2-Attn (section 3.2): tokens attend inside groups of G, and in half
of the heads the groups begin G / 2 later. LoRA is on q, k, v and out. Norms and embeddings train
directly, which the paper finds to matter (section 3.3): here the denoiser's own norms and its
embeddings of time, position and class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.lowrank import Alpha, LowRank, Rank, Sites, edit_of

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Longlora(LowRank):
    """Options of low rank, and the groups that the chosen self-attention gets."""

    kind: ClassVar[EditKind] = "adapt"
    systems: ClassVar[str] = "LongLoRA"
    paper: ClassVar[str] = "arXiv 2309.12307"

    rank: Rank = 8
    alpha: Alpha = 16.0
    sites: Sites = "self"
    group: float = Field(
        0.25,
        gt=0,
        description="G, tokens of a group: up to 1 a share of all tokens (1/4 in the paper), above "
        "it their number",
    )
    whole: tuple[Literal["norms", "embeddings"], ...] = Field(
        ("norms", "embeddings"),
        description="what of the denoiser trains directly, without LoRA",
    )

    @field_validator("group")
    @classmethod
    def _share_or_number(cls, group: float) -> float:
        if group > 1 and group != int(group):
            raise ValueError("give a share of at most 1, or a whole number of tokens")
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
        direct = self._trained_directly(model)
        trains = (*inject(model, targets, self.config, owner=self.name), *direct)
        model.host.install(ShiftedSparse(self.group), grouped)
        kernels = [(f"{model.denoiser_name}.{site.name}", "the kernel") for site in grouped]
        return edit_of(targets, trains, also=kernels)

    def _trained_directly(self, model: AttentionModel) -> list[str]:
        """Names of the norms and embeddings that train; layers that scale norms by the timestep are
        no norms."""
        found = []
        for name, layer in model.denoiser.named_modules():
            norm = "norms" in self.whole and "Norm" in type(layer).__name__
            if norm or ("embeddings" in self.whole and "embed" in name):
                path = f"{model.denoiser_name}.{name}"
                found += [f"{path}.{own}" for own, _ in layer.named_parameters(recurse=False)]
        return found
