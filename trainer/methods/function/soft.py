"""SOFT: a Gaussian kernel in place of softmax, through landmarks, so that its cost is linear in the
tokens.

    K(a, b) = exp(-|a - b|^2 / 2),  o = K(q, l) K(l, l)^-1 K(l, q) v,  l = GELU(LN(conv(q)))

Lu et al., NeurIPS 2021, arXiv 2110.11945, section 3. The paper's networks have one projection for
queries and keys, and are trained so. In a model trained with softmax the mean of the two stands for
both (`trainer/ops/soft.py`), which is another attention than before: it has to be trained, with
`distill` and `selective` or `lora` on the same sites, as in `recipes/linear_swap.yaml`:

    python -m trainer fit recipe=linear_swap methods.linear_attention=null \\
        methods.soft='{ratio: 2, distill: 1, distill_until: 0.5}'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.options import OddSize
from trainer.methods.shared.swap import Swap

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


class Soft(Swap):
    """How many landmarks, and what helps them."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "SOFT"
    paper: ClassVar[str] = "arXiv 2110.11945"

    ratio: int = Field(
        8,
        gt=0,
        description="on the finest of the chosen grids, ratio x ratio tokens become one landmark; "
        "on one that is half as fine, ratio / 2, and so on down to 1 (8, 4, 2, 1 in the paper)",
    )
    iterations: int = Field(20, gt=0, description="of Newton's, for the inverse")
    shortcut: OddSize = Field(
        3,
        description="size of a depthwise convolution over the values on their grid, which trains "
        "and restores local detail; 0 for none",
    )

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.attention.sites import require
        from trainer.ops.soft import SoftOp

        sites = require(model.sites, self.sites, "sites")
        if other := [site for site in sites if site.kind in ("cross", "temporal")]:
            raise ValueError(
                f"methods.soft: {other[0].name} is {other[0].kind} attention; soft has one "
                "projection for queries and keys, on the grid of a picture: give sites=self"
            )
        least = min((site.divisor for site in sites if site.divisor), default=1)
        divisors = [site.divisor or least for site in sites]  # an unknown grid is as the finest
        ratios = [max(1, self.ratio * least // divisor) for divisor in divisors]
        return self.swap(
            model,
            lambda index, site: SoftOp(
                site, ratios[index], iterations=self.iterations, shortcut=self.shortcut
            ),
        )
