"""PVA's visual attention at one site of cross-attention: queries, keys and values of its own for
the tokens of reference pictures, under one softmax with those of the text.

    O = softmax([Q_t K_t^T, Q_v K_v^T] / sqrt(d)) [V_t; V_v]

Xu et al., "Personalized Face Inpainting with Diffusion Models by Parallel Visual Attention",
arXiv 2312.03556, section 3.2. One softmax over both is that of joined heads: with Q = [Q_t, Q_v],
K = [[K_t, 0], [0, K_v]] the scores are Q K^T, whose scale stays that of d.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention.op import Traits
from trainer.data.references import REFERENCE
from trainer.kernels.softmax import softmax_attention
from trainer.ops.branches.reference_tokens import reference_tokens

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall

NAME = "pva"
TOKENS = NAME  # of the condition, (b, k n, d)
ENCODER, PROJECTOR = "pva_encoder", "pva_projector"  # the extra modules


def encode_visual(model: Any, inputs: Mapping[str, Tensor], present: Tensor) -> dict[str, Tensor]:
    """The tokens (b, k n, d) of the k reference pictures of each of b samples."""
    pictures = inputs[REFERENCE]
    found = reference_tokens(model, pictures, present, encoder=ENCODER, projector=PROJECTOR)
    return {TOKENS: found.flatten(1, 2)}


class VisualAttention(nn.Module):
    """The layers of queries, keys and values for pictures. layers: those for the text, of which
    they begin as copies."""

    name = NAME
    traits = Traits(owner=NAME, classic=True)

    def __init__(self, layers: Mapping[str, nn.Module], heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (_copy_of(layers[role]) for role in "qkv")

    def tokens(self, x: Tensor, call: SiteCall) -> Tensor:
        call.scratch(self)["x"] = x
        return x

    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: SiteCall
    ) -> Tensor:
        condition = call.ctx.condition
        if condition is None or TOKENS not in condition.further:
            return softmax_attention(q, k, v, mask=mask, scale=call.scale)
        seen = condition.further[TOKENS]
        q_v, k_v, v_v = (
            made.unflatten(-1, (self.heads, -1)).transpose(1, 2).to(q)
            for made in (self.to_q(call.scratch(self)["x"]), self.to_k(seen), self.to_v(seen))
        )
        width, scale = q.shape[-1], q.shape[-1] ** -0.5 if call.scale is None else call.scale
        keys = torch.cat([F.pad(k, (0, width)), F.pad(k_v, (width, 0))], 2)
        values = torch.cat([v, v_v], 2)
        if mask is not None:  # every query sees the pictures
            mask = F.pad(mask, (0, k_v.shape[2]), value=mask.dtype == torch.bool)
        return softmax_attention(torch.cat([q, q_v], -1), keys, values, mask=mask, scale=scale)


def _copy_of(layer: nn.Module) -> nn.Linear:
    """In fp32, without a bias where there is none."""
    weight: Any = layer.get_parameter("weight")
    bias: Any = getattr(layer, "bias", None)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
    made.weight.data.copy_(weight.detach())
    if bias is not None:
        made.bias.data.copy_(bias.detach())
    return made
