"""LoRA on a frozen linear layer in 4 bits in fewer passes over the tokens: peft's layer, parameters
and equation, with our own backward.

y = (W0 + s B A) x + b, with W0 the values of the layer (QLoRA, arXiv 2305.14314, equation 5, which
adds s B A x to W0 x). The sum is computed in the forward and again in the backward, and never kept:
the layer is in 4 bits to take less memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from trainer.backbones.four_bits import is_packed, values
from trainer.ops.adapters.low_rank_products import is_small, low_rank_gradients, token_rows


@cache
def over_four_bits() -> Any:
    """The class for layers in 4 bits; peft has its own only where bitsandbytes is installed."""
    from peft.tuners.lora.bnb import Linear4bit

    class LowRankLinear4bit(Linear4bit):
        """peft's layer with one LoRA adapter over a layer in 4 bits; peft handles all other
        cases."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args or kwargs or not _is_plain(self, x):
                found: Tensor = super().forward(x, *args, **kwargs)
                return found
            layer: Any = self.base_layer
            (name,) = self.active_adapters
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            result: Tensor = _LoraOverFourBits.apply(x, layer, layer.bias, a, b, self.scaling[name])
            return result

    return LowRankLinear4bit


def _is_plain(own: Any, x: Tensor) -> bool:
    """Whether one LoRA of a layer acts in float32, without dropout, on so many rows that adding B A
    to the matrix costs less than to what comes out of it."""
    if own.disable_adapters or own.merged or len(own.active_adapters) != 1:
        return False
    (name,) = own.active_adapters
    if name not in own.lora_A or own.lora_bias[name] or name in own.lora_variant:
        return False
    dropout, layer = own.lora_dropout[name], own.base_layer
    if not is_packed(layer) or torch.is_autocast_enabled(x.device.type):
        return False
    inputs, outputs = layer.in_features, layer.out_features
    return bool(
        (isinstance(dropout, nn.Identity) or not own.training)
        and x.dtype == layer.compute_dtype == torch.float32
        and x.numel() // x.shape[-1] * (inputs + outputs) >= inputs * outputs
    )


class _LoraOverFourBits(torch.autograd.Function):
    """x (..., c), layer the one in 4 bits that holds W0 (d, c), bias (d) or None, a (r, c),
    b (d, r) -> (..., d)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: Any, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.layer, ctx.scale = layer, scale
        ctx.save_for_backward(x, a, b)
        return linear(x, values(layer).addmm_(b, a, alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        rows, scale, need = token_rows(grad), ctx.scale, ctx.needs_input_grad[0]
        whole = values(ctx.layer).addmm_(b, a, alpha=scale)
        if not is_small(whole, a):
            on_x, on_a, on_b = low_rank_gradients(
                rows, x, whole, low=None, a=a, b=b, scale=scale, need=need
            )
            return on_x, None, None, on_a, on_b, None
        on_x = (rows @ whole).view(x.shape) if need else None
        on_whole = (rows.T @ token_rows(x)).mul_(scale)
        return on_x, None, None, b.T @ on_whole, on_whole @ a.T, None
