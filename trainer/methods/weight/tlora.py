"""T-LoRA: the rank of a LoRA falls with the noise, so that noisy steps, which decide the layout,
cannot learn one photo by heart.

    h = W0 x + alpha / rank * (B S M_t A - B0 S0 M_t A0) x
    M_t keeps the first r(t) of rank, r(t) = floor((rank - r_min) ((T - t) / T)^power) + r_min

Soboleva et al., arXiv 2507.05964, made for a single photo. A, S, B are a singular value
decomposition, so that no two ranks do the same: as the paper found best, that of the last singular
values of a random matrix (its Ortho-LoRA); the start is subtracted, frozen. `init=zero` is the
paper's Vanilla T-LoRA, B zero and nothing subtracted. The mask acts in training and sampling,
on every batch row by its own timestep.

No LoRA file of another tool has the mask, so `export` refuses; LyCORIS has such a file, whose
loader subtracts another start. A0, S0, B0 are stored, which doubles the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.lowrank import LowRank, Rank, edit_of

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.ops.adapters.inject import Target


class Tlora(LowRank):
    """Options of low rank, where it starts, and how the rank falls."""

    kind: ClassVar[EditKind] = "adapt"
    systems: ClassVar[str] = "T-LoRA"
    paper: ClassVar[str] = "arXiv 2507.05964"

    rank: Rank = 64
    min_share: float = Field(
        0.5, ge=0, le=1, description="r_min, the rank at pure noise, as a share of rank"
    )
    power: float = Field(
        1.0, gt=0, description="1 lets the rank fall linearly; above, faster in the noisy steps"
    )
    timesteps: float = Field(1000, gt=0, description="T, the timestep of pure noise")
    init: Literal["random", "weight", "zero"] = Field(
        "random",
        description="where A, S, B start: from the singular value decomposition of a random "
        "matrix or of W0, which is subtracted; or A uniform and B zero, as lora",
    )
    singular: Literal["last", "middle", "principal"] = Field(
        "last", description="which singular values of that decomposition"
    )

    @model_validator(mode="after")
    def _in_the_denoiser(self) -> Tlora:
        if self.text_encoder or self.text_layers:
            raise ValueError(
                "the text encoder is called without a timestep, so no rank there can follow it; "
                "remove text_encoder and text_layers, or use methods.lora"
            )
        return self

    def idle(self) -> dict[str, str]:
        own = {}
        if self.init == "zero":
            own["singular"] = "init=zero has no singular values"
        if self.min_share == 1:
            own |= dict.fromkeys(("power", "timesteps"), "min_share=1 leaves the rank as it is")
        return super().idle() | own

    @property
    def reads_weights(self) -> bool:
        return self.init == "weight"

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.ops.adapters.inject import inject, layer_of
        from trainer.ops.adapters.tlora import RankSchedule, TimestepRank, install

        targets = self.targets(model)
        starts = self._starts(model, targets)
        names = inject(model, targets, self.config, owner=self.name)
        schedule = RankSchedule(self.min_share, self.power, self.timesteps)
        kept: list[str] = []
        for target, factors in zip(targets, starts, strict=True):
            variant = TimestepRank(schedule, model.host.holder)
            layer = layer_of(model, target)
            frozen = install(layer, self.name, variant=variant, factors=factors)
            kept += [f"{target.path}.{name}" for name in frozen]
        scales = [f"{target.path}.lora_S.{self.name}" for target in targets]
        return edit_of(targets, (*names, *scales), kept)

    def _starts(self, model: AttentionModel, targets: Sequence[Target]) -> list[Any]:
        """A, S, B of every target, None for `init=zero`.

        Raises:
            ValueError: a layer in 4 bits has no W0 to start from.
        """
        from trainer.backbones.four_bits import is_packed
        from trainer.ops.adapters import tlora
        from trainer.ops.adapters.inject import base_layer, layer_of, layer_sizes

        found: list[Any] = []
        values: dict[tuple[int, int], Any] = {}
        for target in targets:
            layer: Any = base_layer(layer_of(model, target))
            rank = self.rank_of(target)
            if self.init == "zero":
                found.append(None)
            elif self.init == "random":
                size = layer_sizes(layer)[::-1]
                found.append(tlora.of_random(size, rank, self.singular, values=values))
            elif is_packed(layer):
                raise ValueError(
                    f"init=weight starts from W0 itself, and methods.nf4 stores that of "
                    f"{target.path} in 4 bits; set init=random, or leave it out with "
                    "methods.nf4.skip"
                )
            else:
                found.append(tlora.of_weight(layer.weight, rank, self.singular))
        return found
