"""Linear attention in the place of softmax attention: O(n) in the tokens, for large images.

    o_i = phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) sum_j phi(k_j)^T)

phi by name: `relu` (Sana, arXiv 2410.10629), `elu` (arXiv 2006.16236), `focused` (FLatten, arXiv
2308.00442), `cos` (cosFormer, arXiv 2202.08791), `efficient` (arXiv 1812.01243), `random` (FAVOR+
of the Performer, arXiv 2009.14794). A model trained with softmax attention has to learn it: with
`distill` the sites learn what they did before, with `selective` or `lora` on the same sites.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from trainer.methods.method import Edit
from trainer.methods.shared.options import OddSize
from trainer.methods.shared.swap import Swap

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class LinearAttention(Swap):
    """Options of `Swap`; features: phi; num_features, seed: how many random ones, and which.

    shortcut: size of a depthwise convolution over the values on their grid, which trains and gives
    back what is local (FLatten, equation 8), 0 for none.
    """

    features: Literal["relu", "elu", "focused", "cos", "efficient", "random"] = "relu"
    num_features: int = Field(64, gt=0)
    seed: int = Field(0, ge=0)
    shortcut: OddSize = 0

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.ops.linear_attention import LinearAttentionOp

        return self.swap(
            model,
            lambda _, site: LinearAttentionOp(
                site, self.features, self.num_features, self.seed, self.shortcut
            ),
        )
