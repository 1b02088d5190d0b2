"""Gated linear attention in place of softmax attention: a state runs over the image and forgets
channel by channel.

    S_t = Diag(alpha_t) S_{t-1} + k_t^T v_t,  o_t = d^-0.5 q_t S_t
    alpha_t = sigmoid(x_t W1 W2 + b)^(1 / tau),  o <- swish(x Wr) (.) RMSNorm(o)

GLA, Yang et al., arXiv 2312.06635; it scans images from four sides in turn as in DiG, Zhu et al.,
arXiv 2405.18428, with its depthwise convolution after each block if asked for. The site's own q, k
and v stay; `selective` or `lora` trains them, or `full` all of the denoiser.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from trainer.methods.method import Edit, EditKind
from trainer.methods.shared.options import OddSize
from trainer.methods.shared.swap import Swap

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.attention.sites import Site


class GatedLinear(Swap):
    """How the state is gated and in which order it reads the image."""

    kind: ClassVar[EditKind] = "attention"
    systems: ClassVar[str] = "Gated Linear Attention (GLA), DiG"
    paper: ClassVar[str] = "arXiv 2312.06635, 2405.18428"

    rank: int = Field(16, gt=0, description="columns of W1, the low rank of the gate (16 in GLA)")
    tau: float = Field(
        16.0, gt=0, description="temperature of the gate: larger values forget more slowly"
    )
    scans: Literal[1, 2, 4] = Field(
        1,
        description="directions whose mean a site takes; with 1 the sites take turns with the four "
        "directions, with 2 with rows and columns, both ways",
    )
    convolution: OddSize = Field(
        0,
        description="size of a depthwise convolution over the tokens after the block around each "
        "site, the identity at the start (3 in DiG); 0 for none",
    )

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.kernels.gated_linear import ORDERS
        from trainer.ops.block_convolution import BlockConvolution
        from trainer.ops.gated_linear import GatedLinearOp

        def op(index: int, site: Site) -> GatedLinearOp:
            first = index * self.scans % len(ORDERS)
            orders = ORDERS[first : first + self.scans]
            return GatedLinearOp(site, orders, rank=self.rank, tau=self.tau)

        def convolution(_: int, site: Site) -> BlockConvolution:
            return BlockConvolution(site, self.convolution, self.name)

        return self.swap(model, op, convolution if self.convolution else None)
