"""LoRA and DoRA on a frozen linear layer in fewer passes over the tokens: peft's layers, parameters
and equations, with a backward of our own.

y = W0 x + b + s B A x (LoRA, arXiv 2106.09685, equation 3) and y = m / |W0 + s B A| (W0 + s B A) x
+ b with the norm a constant (DoRA, arXiv 2402.09353, equation 5 and section 4.3). Products of a
tall matrix are taken in the order that BLAS is quick at; nothing is added up in a pass of its own.
W0 + s B A is kept for the backward where it is no larger than x.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn.functional import linear


class LowRankLinear(Linear):
    """peft's layer with one LoRA or DoRA adapter; in all other cases peft's own forward runs."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self._plain(x):
            found: Tensor = super().forward(x, *args, **kwargs)
            return found
        layer: Any = self.base_layer
        (name,) = self.active_adapters
        first: Any = self.lora_A[name]
        second: Any = self.lora_B[name]
        a, b, scale = first.weight, second.weight, self.scaling[name]
        if name in self.lora_variant:
            length = self.lora_magnitude_vector[name].weight
            result: Tensor = _Dora.apply(x, layer.weight, layer.bias, a, b, length, scale)
        elif _tall(x, layer.weight) and _small(layer.weight, a):
            result = linear(x, torch.addmm(layer.weight, b, a, alpha=scale), layer.bias)
        else:
            result = _Lora.apply(x, layer.weight, layer.bias, a, b, scale)
        return result

    def _plain(self, x: Tensor) -> bool:
        """Whether one adapter acts on a frozen layer, without dropout, all in one dtype."""
        layer: Any = self.base_layer
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        (name,) = self.active_adapters
        if name not in self.lora_A or self.lora_bias[name]:
            return False
        if not isinstance(self.lora_variant.get(name), DoraLinearVariant | None):
            return False
        dropout = self.lora_dropout[name]
        return (
            (isinstance(dropout, nn.Identity) or not self.training)
            and not layer.weight.requires_grad
            and not (layer.bias is not None and layer.bias.requires_grad)
            and not torch.is_autocast_enabled(x.device.type)
            and x.dtype == layer.weight.dtype == self.lora_A[name].weight.dtype
        )


def quicken(layer: nn.Module) -> None:
    """Turns a layer that peft has put on a plain linear one into a `LowRankLinear`; no other."""
    if type(layer) is Linear and type(layer.base_layer) is nn.Linear:
        layer.__class__ = LowRankLinear


class _Lora(torch.autograd.Function):
    """x (..., c), weight (d, c), bias (d) or None, a (r, c), b (d, r) -> (..., d)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.scale = scale
        if _tall(x, weight):
            whole = torch.addmm(weight, b, a, alpha=scale)
            ctx.save_for_backward(x, whole, None, a, b)
            return linear(x, whole, bias)
        low = _times_columns(a, x)
        ctx.save_for_backward(x, weight, low, a, b)
        y = linear(x, weight, bias)
        _rows(y).addmm_(low.T, b.T, alpha=scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, low, a, b = ctx.saved_tensors
        need = ctx.needs_input_grad[0]
        on_x, on_a, on_b = _gradients(
            _rows(grad), x, weight=weight, low=low, a=a, b=b, scale=ctx.scale, need=need
        )
        return on_x, None, None, on_a, on_b, None


class _Dora(torch.autograd.Function):
    """As `_Lora`, and length (d): m."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        length: Tensor,
        scale: float,
    ) -> Tensor:
        whole = torch.addmm(weight, b, a, alpha=scale)
        norm, straight = whole.norm(dim=1), linear(x, whole)
        kept = (whole, None) if _tall(x, weight) else (weight, _times_columns(a, x))
        ctx.save_for_backward(x, *kept, a, b, straight, norm, length)
        ctx.scale = scale
        factor = length / norm
        return straight * factor if bias is None else torch.addcmul(bias, straight, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, low, a, b, straight, norm, length = ctx.saved_tensors
        rows, need = _rows(grad), ctx.needs_input_grad[0]
        on_length = (rows * _rows(straight)).sum(0) / norm
        on_x, on_a, on_b = _gradients(
            rows * (length / norm), x, weight=kept, low=low, a=a, b=b, scale=ctx.scale, need=need
        )
        return on_x, None, None, on_a, on_b, on_length, None


def _gradients(
    grad: Tensor,
    x: Tensor,
    *,
    weight: Tensor,
    low: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    need: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Those of (W0 + s B A) x on x, A and B; grad (n, d), x (..., c). weight is W0 where
    low = A x (r, n) is given, W0 + s B A where it is not."""
    on_low = _times_columns(b.T, grad)
    on_x = None
    if need:
        on_x = grad @ weight
        if low is not None:
            on_x.addmm_(on_low.T, a, alpha=scale)
        on_x = on_x.view(x.shape)
    if low is None:
        low = _times_columns(a, x)
    on_a, on_b = on_low @ _rows(x), (low @ grad).T
    if scale != 1:
        on_a, on_b = on_a * scale, on_b * scale
    return on_x, on_a, on_b


def _tall(x: Tensor, weight: Tensor) -> bool:
    """Whether x has more rows than the matrix: then adding B A to the matrix costs less than to
    what comes out of it."""
    return x.numel() // x.shape[-1] >= max(weight.shape)


def _small(weight: Tensor, a: Tensor) -> bool:
    """Whether the gradient of the matrix itself, from which those of A and B follow, costs less
    than four products with r columns each, at which BLAS is some four times slower."""
    return weight.numel() <= 4 * a.shape[0] * sum(weight.shape)


def _times_columns(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix (r, c), x (..., c) -> (r, n): quicker on a CPU than its transpose."""
    return matrix @ _rows(x).T


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
