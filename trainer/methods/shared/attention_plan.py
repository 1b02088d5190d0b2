"""The small file that says what each layer of attention does at each step of a sampler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.common.atomic import written_atomically
from trainer.ops.reduction.choices import Choice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.attention.sites import Site

NEAR = 0.02  # how far two models of one name may be apart in the size of a weight, by rounding


class AttentionPlan(BaseModel):
    """steps, guided: of the sampler it was made for; window: share of the tokens; sites: what each
    does step by step; weights: the mean size of each site's query weights, by which another model
    of the same layout is recognised; attention_flop: the share of dense attention that is left."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal["attention plan 1"] = "attention plan 1"
    denoiser: str
    steps: int = Field(gt=0)
    guided: bool
    window: float = Field(gt=0, le=1)
    threshold: float
    sites: dict[str, tuple[Choice, ...]]
    weights: dict[str, float]
    attention_flop: float = Field(ge=0, le=1)

    @classmethod
    def read(cls, path: Path) -> AttentionPlan:
        """Raises ValueError for a file that is none."""
        try:
            return cls.model_validate_json(path.expanduser().read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(
                f"plan={path}: there is no such file; make one by `python -m trainer calibrate "
                f"recipe=ditfastattn out={path.name}`"
            ) from None
        except (ValidationError, UnicodeDecodeError, OSError) as error:
            first = str(error).splitlines()[0]
            raise ValueError(
                f"plan={path} is no plan of `calibrate` ({first}); make it again"
            ) from None

    def write(self, path: Path) -> None:
        with written_atomically(path) as part:
            part.write_text(json.dumps(self.model_dump(), indent=1) + "\n", encoding="utf-8")

    def check(self, denoiser: str, sites: Sequence[Site], path: Path) -> None:
        """Raises ValueError where it was made for another backbone, or for other sites."""
        again = "make one for this backbone with `calibrate`"
        if denoiser != self.denoiser:
            raise ValueError(
                f"plan={path} is for {self.denoiser}, and this backbone has {denoiser}; {again}"
            )
        names = [site.name for site in sites]
        if names != list(self.sites):
            odd = sorted(set(names) ^ set(self.sites))
            raise ValueError(
                f"plan={path} is for other layers than are chosen here ({', '.join(odd[:3])}); "
                f"choose the same sites, or {again}"
            )
        if short := [name for name, rule in self.sites.items() if len(rule) != self.steps]:
            raise ValueError(
                f"plan={path} does not say what {short[0]} does at each of {self.steps} steps; "
                "make it again with `calibrate`"
            )
        for name, size in weight_sizes(sites).items():
            if abs(size - self.weights.get(name, 0)) > NEAR * max(size, 1e-12):
                raise ValueError(
                    f"plan={path} was made for other weights than this backbone has at {name}; "
                    f"{again}"
                )


def weight_sizes(sites: Sequence[Site]) -> dict[str, float]:
    """The mean absolute weight of each site's query layer, as it is below adapters."""
    found = {}
    for site in sites:
        layer = site.projection("q")
        weight = getattr(layer, "base_layer", layer).weight
        if weight.is_floating_point():
            found[site.name] = float(f"{float(weight.detach().float().abs().mean()):.6g}")
    return found
