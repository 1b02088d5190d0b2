"""PEFT with Controls: beside each frozen layer a low-rank controller whose tokens attend to each
other, with no more parameters than LoRA.

    h = W0 x + g(x),  g(x) = LoRA(x) + CPA(LoRA(x))
    CPA(y)_j = sum_i softmax_i(<y_j, y_i>) y_i  over the tokens

ICML 2024. LoRA(x) = alpha / rank * B A x with B zero, so g = 0 at the start. CPA works on the
output of LoRA, not on the `rank` values between A and B, and costs O(n^2) for n tokens. It is no
function of single tokens, so no weight matrix can express it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.lowrank import LowRank, edit_of

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.ops.adapters.inject import Target


class Controls(LowRank):
    """Options of low rank, on linear layers only."""

    kind: ClassVar[EditKind] = "adapt"
    systems: ClassVar[str] = "PEFT with Controls"
    paper: ClassVar[str] = "ICML 2024"

    def apply(self, model: AttentionModel) -> Edit:
        from torch import nn

        from trainer.ops.adapters.controls import ControlledLinear
        from trainer.ops.adapters.inject import base_layer, inject, layer_of

        targets = self.targets(model)
        for target in targets:
            if not isinstance(base_layer(layer_of(model, target)), nn.Linear):
                raise ValueError(
                    f"{target.path} is a convolution, which has no tokens; name linear layers"
                )

        def config(own: Sequence[Target]) -> Any:
            made = self.config(own)
            made._register_custom_module({nn.Linear: ControlledLinear})
            return made

        trains = inject(model, targets, config, owner=self.name)
        return edit_of(targets, trains)
