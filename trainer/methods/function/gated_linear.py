"""Gated linear attention in the place of softmax attention: a state led over the image, which
forgets channel by channel.

    S_t = Diag(alpha_t) S_{t-1} + k_t^T v_t,  o_t = d^-0.5 q_t S_t
    alpha_t = sigmoid(x_t W1 W2 + b)^(1 / tau),  o <- swish(x Wr) (.) RMSNorm(o)

GLA, Yang et al., arXiv 2312.06635; led over images from four sides in turn as in DiG, Zhu et al.,
arXiv 2405.18428, with its depthwise convolution after each block if asked for. The site's own q, k
and v stay; `selective` or `lora` trains them, or `full` all of the denoiser.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from trainer.methods.method import Edit
from trainer.methods.shared.options import OddSize
from trainer.methods.shared.swap import Swap

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel
    from trainer.attention.sites import Site


class GatedLinear(Swap):
    """Options of `Swap`; rank: columns of W1; tau: the larger, the longer the memory.

    scans: over how many of the four directions a site takes the mean; with 1 and 2 the sites take
    turns, one direction each, or rows and columns both ways. convolution: size of a depthwise
    convolution over the tokens after the block around each site, the identity at the start; 3 in
    DiG, 0 for none.
    """

    rank: int = Field(16, gt=0)
    tau: float = Field(16.0, gt=0)
    scans: Literal[1, 2, 4] = 1
    convolution: OddSize = 0

    def apply(self, model: AttentionModel) -> Edit:
        from trainer.kernels.gated_linear import ORDERS
        from trainer.ops.block_convolution import BlockConvolution
        from trainer.ops.gated_linear import GatedLinearOp

        def op(index: int, site: Site) -> GatedLinearOp:
            first = index * self.scans % len(ORDERS)
            return GatedLinearOp(site, ORDERS[first : first + self.scans], self.rank, self.tau)

        def convolution(_: int, site: Site) -> BlockConvolution:
            return BlockConvolution(site, self.convolution, "gated_linear")

        return self.swap(model, op, convolution if self.convolution else None)
