"""DoRA: magnitude and direction of a weight apart, W' = m (W0 + s B A) / |W0 + s B A| by row.

Liu et al., arXiv 2402.09353, equation 5; m starts as |W0|, B as zero, so training starts at the
base model. The norm is a constant to the gradient (section 4.3 of the paper), as in peft.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trainer.methods import Edit
from trainer.methods.lowrank import LowRank, edit_of

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Dora(LowRank):
    """Options of `LowRank`; init: where A starts (B is zero)."""

    init: Literal["default", "gaussian"] = "default"

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.inject import inject

        targets = self.targets(model)
        start = True if self.init == "default" else self.init
        trains = inject(
            model, targets, lambda t: self.config(t, init_lora_weights=start, use_dora=True), "dora"
        )
        return edit_of(targets, trains)
