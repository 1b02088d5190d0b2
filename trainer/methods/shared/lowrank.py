"""What all methods that put adapters on layers have in common: which layers; and those of low rank:
which rank, which strength."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from trainer.attention.projections import ALL_ROLES, Role
from trainer.attention.sites import TextRole
from trainer.methods.method import Edit, Method
from trainer.methods.shared.options import SELECTOR, SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.ops.adapters.inject import Target


Sites = Annotated[
    SiteSelector | None,
    Field(description=f"attention sites whose layers get an adapter, null for none: {SELECTOR}"),
]
Projections = Annotated[
    tuple[Role, ...],
    Field(
        description="which layers of each site, of those it has: query, key, value, output; add_* "
        "are those of text tokens, where text has layers of its own; qkv is one fused layer"
    ),
]
Rank = Annotated[int, Field(gt=0, description="r, the rows of A and columns of B")]
Alpha = Annotated[
    float | None,
    Field(gt=0, description="the delta is alpha / rank B A; null is alpha = rank, strength 1"),
]


class Targeted(Method):
    """Methods that put adapters on layers, of attention sites and besides."""

    sites: Sites = "all"
    projections: Projections = ALL_ROLES
    layers: tuple[str, ...] = Field(
        (),
        description="further linear and convolution layers of the denoiser, as globs over their "
        "names, as in *ff.net.2",
    )
    text_encoder: tuple[TextRole, ...] = Field(
        (),
        description="which layers of the text encoders get an adapter: query, key, value and "
        "output of attention, fc1 and fc2 of the feed-forward blocks",
    )
    text_layers: tuple[str, ...] = Field(
        (), description="further linear layers of the text encoders, as layers"
    )

    def idle(self) -> dict[str, str]:
        if self.sites is None:
            return {"projections": "sites=null takes no attention; they are its layers"}
        return {} if self.projections else {"sites": "projections=[] takes none of their layers"}

    def targets(self, model: AttentionModel) -> list[Target]:
        """The layers these options name; ValueError if they name none."""
        from trainer.ops.adapters.inject import (
            named_targets,
            named_text_targets,
            site_targets,
            text_targets,
        )

        found: list[Target] = []
        if self.sites is not None and self.projections:
            found += site_targets(model, self.sites, self.projections)
        if self.layers:
            found += named_targets(model, self.layers)
        if self.text_encoder:
            found += text_targets(model, self.text_encoder)
        if self.text_layers:
            found += named_text_targets(model, self.text_layers)
        unique = list({target.path: target for target in reversed(found)}.values())[::-1]
        if not unique:
            raise ValueError(
                "sites, layers, text_encoder and text_layers name no layer; give one of them, as "
                "in sites=cross"
            )
        return unique


class LowRank(Targeted):
    """Adapters of low rank: W0 stays, and B A of rank r is trained beside it."""

    rank: Rank = 4
    alpha: Alpha = None
    dropout: float = Field(
        0.0, ge=0, lt=1, description="probability that an input of A is set to 0 in training"
    )
    ranks: dict[str, int] = Field(
        default_factory=dict,
        description="ranks of single layers by globs over their names, as in {*to_v: 8}; the last "
        "match counts",
    )
    alphas: dict[str, float] = Field(
        default_factory=dict, description="alpha of single layers, as in ranks"
    )
    rslora: bool = Field(
        False, description="strength alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)"
    )

    @field_validator("ranks", "alphas")
    @classmethod
    def _positive(cls, table: dict[str, Any]) -> dict[str, Any]:
        for pattern, value in table.items():
            if value <= 0:
                raise ValueError(f"{pattern}: {value} is not above 0")
        return table

    def targets(self, model: AttentionModel) -> list[Target]:
        """The layers these options name.

        Raises:
            ValueError: they name none, or a rank is above what a layer can have.
        """
        from trainer.ops.adapters.inject import base_layer, layer_of, layer_sizes

        found = super().targets(model)
        for pattern in (*self.ranks, *self.alphas):
            if not any(fnmatchcase(target.path, pattern) for target in found):
                raise ValueError(
                    f"{pattern!r} in ranks or alphas matches none of the chosen layers; they have "
                    f"names like {found[0].path}"
                )
        for target in found:
            layer = base_layer(layer_of(model, target))
            if getattr(layer, "groups", 1) > 1:
                raise ValueError(
                    f"{target.path} is a convolution in groups, on which no low rank works: the "
                    "product of two matrices would mix the groups; leave it out of layers"
                )
            most = min(layer_sizes(layer))
            if self.rank_of(target) > most:
                raise ValueError(
                    f"rank {self.rank_of(target)} is above the {most} that {target.path} can have; "
                    "lower rank, or give that layer its own in ranks"
                )
        return found

    def rank_of(self, target: Target) -> int:
        own = [value for glob, value in self.ranks.items() if fnmatchcase(target.path, glob)]
        return own[-1] if own else self.rank

    def alpha_of(self, target: Target) -> float:
        own = [value for glob, value in self.alphas.items() if fnmatchcase(target.path, glob)]
        return own[-1] if own else self.alpha if self.alpha is not None else self.rank_of(target)

    def config(self, targets: Sequence[Target], **options: Any) -> Any:
        """A peft `LoraConfig` for targets of one part."""
        from peft import LoraConfig

        from trainer.ops.adapters.inject import exactly

        default = self.rank if self.alpha is None else self.alpha
        return LoraConfig(
            r=self.rank,
            lora_alpha=default,  # type: ignore[arg-type]  # any number does
            lora_dropout=self.dropout,
            target_modules=exactly(targets),
            rank_pattern=exceptions(targets, self.rank_of, self.rank),
            alpha_pattern=exceptions(targets, self.alpha_of, default),
            use_rslora=self.rslora,
            **options,
        )


def edit_of(
    targets: Sequence[Target],
    trains: Sequence[str],
    keeps: Sequence[str] = (),
    also: Sequence[tuple[str, str]] = (),
    **more: Any,
) -> Edit:
    """What a method did that put adapters on `targets`. It claims these layers, the parameters it
    trains and keeps, and `also`; more: further fields of the `Edit`."""
    from trainer.ops.adapters.inject import claims, sites_of

    return Edit(
        sites=sites_of(targets),
        claims=(*claims(targets, (*trains, *keeps)), *also),
        trains=tuple(trains),
        keeps=tuple(keeps),
        **more,
    )


def exceptions(
    targets: Sequence[Target], value: Callable[[Target], float | None], default: float | None
) -> dict[str, Any]:
    """peft's pattern of the layers that differ: it tries every pattern on every layer."""
    differing = [target for target in targets if value(target) != default]
    return {f"^{re.escape(target.name)}": value(target) for target in differing}
