"""DoRA: the length and the direction of each row of a weight are learned separately.

    W' = m (W0 + s B A) / |W0 + s B A|    row by row

Liu et al., arXiv 2402.09353, equation 5; m starts as |W0|, B as zero, so training starts at the
base model. The norm is a constant to the gradient (section 4.3 of the paper), as in peft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.lowrank import LowRank, edit_of

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.ops.adapters.inject import Target


class Dora(LowRank):
    """Options of low rank."""

    kind: ClassVar[EditKind] = "adapt"
    systems: ClassVar[str] = "DoRA"
    paper: ClassVar[str] = "arXiv 2402.09353"

    init: Literal["default", "gaussian"] = Field(
        "default", description="where A starts, as of lora; B starts at zero"
    )

    @property
    def reads_weights(self) -> bool:
        return True

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.ops.adapters.inject import inject

        targets = self.targets(model)
        _refuse_nothing(model, targets)
        start = True if self.init == "default" else self.init

        def config(own: Sequence[Target]) -> Any:
            return self.config(own, init_lora_weights=start, use_dora=True)

        trains = inject(model, targets, config, owner=self.name)
        return edit_of(targets, trains)


def _refuse_nothing(model: AttentionModel, targets: Sequence[Target]) -> None:
    """Raises ValueError where a row of W0 is zero: it has no direction."""
    from trainer.backbones.four_bits import unpacked
    from trainer.ops.adapters.inject import base_layer, layer_of

    for target in targets:
        weight: Any = unpacked(base_layer(layer_of(model, target))).weight
        if not weight.flatten(1).any(dim=1).all():
            raise ValueError(
                f"{target.path} holds rows of zeros, which have a length and no direction; leave "
                "it out, as in projections=[q,k,v], or use methods.lora"
            )
