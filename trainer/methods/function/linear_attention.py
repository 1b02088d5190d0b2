"""Linear attention in place of softmax attention: its cost is linear in the tokens.

    o_i = phi(q_i) sum_j phi(k_j)^T v_j / (phi(q_i) sum_j phi(k_j)^T)

phi by name: `relu` (Sana, arXiv 2410.10629), `elu` (arXiv 2006.16236), `focused` (FLatten, arXiv
2308.00442), `cos` (cosFormer, arXiv 2202.08791), `efficient` (arXiv 1812.01243), `random` (FAVOR+
of the Performer, arXiv 2009.14794). A model trained with softmax attention has to learn it: with
`distill` the sites learn what they did before, with `selective` or `lora` on the same sites.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.options import OddSize
from trainer.methods.shared.swap import Swap

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.attention.sites import Site


class LinearAttention(Swap):
    """Which feature map, and what helps it."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = (
        "Linear attention, Sana, FLatten, cosFormer, Efficient Attention, Performer"
    )
    paper: ClassVar[str] = "arXiv 2006.16236, 2410.10629"

    features: Literal["relu", "elu", "focused", "cos", "efficient", "random"] = Field(
        "relu",
        description="phi: relu (Sana, arXiv 2410.10629), elu (2006.16236), focused (FLatten, "
        "2308.00442), cos (cosFormer, 2202.08791), efficient (1812.01243) or random (Performer, "
        "2009.14794)",
    )
    num_features: int = Field(64, gt=0, description="with random: how many features")
    seed: int = Field(0, ge=0, description="with random: another seed gives other features")
    redraw: int = Field(
        0,
        ge=0,
        description="with random: steps after which training draws new features, so that nothing "
        "is learned that holds for one draw alone (arXiv 2009.14794); sampling has "
        "those of the seed. 0 keeps these in training, too",
    )
    shortcut: OddSize = Field(
        0,
        description="size of a depthwise convolution over the values on their grid, which trains "
        "and restores local detail (FLatten, equation 8); 0 for none",
    )

    def idle(self) -> dict[str, str]:
        own = () if self.features == "random" else ("num_features", "seed", "redraw")
        why = f"features is {self.features}; it is for random"
        return super().idle() | dict.fromkeys(own, why)

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.ops.linear_attention import LinearAttentionOp

        made: list[LinearAttentionOp] = []

        def op(_: int, site: Site) -> LinearAttentionOp:
            made.append(
                LinearAttentionOp(
                    site,
                    self.features,
                    num_features=self.num_features,
                    seed=self.seed,
                    shortcut=self.shortcut,
                    redraw=self.redraw,
                )
            )
            return made[-1]

        def redraw(step: int) -> None:
            for each in made:
                each.at_step(step)

        edit = self.swap(model, op)
        return replace(edit, at_step=redraw) if self.redraw else edit
