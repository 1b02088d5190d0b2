"""What all methods that put adapters on layers have in common: which layers; and those of low rank:
which rank, which strength."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from trainer.attention.sites import Role
from trainer.methods.method import Edit, Method
from trainer.methods.shared.options import SiteSelector

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.ops.adapters.inject import Target


class Targeted(Method):
    """sites, projections: a selector of attention sites and which of their layers. layers: globs
    over further linear and convolution layers of the denoiser, as in `*ff.net.2`; text_encoder:
    projections of the text encoders.
    """

    kind: ClassVar[Literal["adapt"]] = "adapt"
    sites: SiteSelector | None = "all"
    projections: tuple[Role, ...] = ("q", "k", "v", "out")
    layers: tuple[str, ...] = ()
    text_encoder: tuple[Role, ...] = ()

    def targets(self, model: AttentionModel) -> list[Target]:
        """The layers these options name; ValueError if they name none."""
        from trainer.ops.adapters.inject import named_targets, site_targets, text_targets

        found: list[Target] = []
        if self.sites is not None and self.projections:
            found += site_targets(model, self.sites, self.projections)
        if self.layers:
            found += named_targets(model, self.layers)
        if self.text_encoder:
            found += text_targets(model, self.text_encoder)
        unique = list({target.path: target for target in reversed(found)}.values())[::-1]
        if not unique:
            raise ValueError(
                "sites, layers and text_encoder name no layer; give one of them, as in sites=cross"
            )
        return unique


class LowRank(Targeted):
    """Options of `Targeted`; rank, alpha: the delta is alpha / rank * B A; alpha null is alpha =
    rank, strength 1.

    ranks, alphas: globs over layer names to values of their own, the last match counts. rslora:
    strength alpha / sqrt(rank) (arXiv 2312.03732). dropout: on the input of A.
    """

    rank: int = Field(4, gt=0)
    alpha: float | None = Field(None, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    ranks: dict[str, int] = Field(default_factory=dict)
    alphas: dict[str, float] = Field(default_factory=dict)
    rslora: bool = False

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
        from trainer.ops.adapters.inject import layer_of, layer_sizes

        found = super().targets(model)
        for pattern in (*self.ranks, *self.alphas):
            if not any(fnmatchcase(target.path, pattern) for target in found):
                raise ValueError(
                    f"{pattern!r} in ranks or alphas matches none of the chosen layers; they have "
                    f"names like {found[0].path}"
                )
        for target in found:
            most = min(layer_sizes(layer_of(model, target)))
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
            rank_pattern=_exceptions(targets, self.rank_of, self.rank),
            alpha_pattern=_exceptions(targets, self.alpha_of, default),
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
    """What a method did that put adapters on `targets`. It claims these places, the parameters it
    trains and keeps, and `also`; more: further fields of the `Edit`."""
    from trainer.ops.adapters.inject import claims, sites_of

    return Edit(
        sites=sites_of(targets),
        claims=(*claims(targets, (*trains, *keeps)), *also),
        trains=tuple(trains),
        keeps=tuple(keeps),
        **more,
    )


def _exceptions(
    targets: Sequence[Target], value: Callable[[Target], float], default: float
) -> dict[str, Any]:
    """peft's pattern of the layers that differ: it tries every pattern on every layer."""
    differing = [target for target in targets if value(target) != default]
    return {f"^{re.escape(target.name)}": value(target) for target in differing}
