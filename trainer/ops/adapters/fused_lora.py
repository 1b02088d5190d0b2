"""LoRA and DoRA on a frozen linear layer in fewer passes over the tokens: peft's layers, parameters
and equations, with our own backward.

y = W0 x + b + s B A x (LoRA, arXiv 2106.09685, equation 3) and y = m / |W0 + s B A| (W0 + s B A) x
+ b with the norm a constant (DoRA, arXiv 2402.09353, equation 5 and section 4.3). Products
are ordered for the fastest BLAS calls, and additions are fused into them (`addmm`). In float32,
W0 + s B A is computed and kept for the backward if it is no larger than x. In half precision it
never is for LoRA, because rounding to the precision of W0 would lose a small B A.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn.functional import linear

from trainer.backbones.four_bits import is_packed
from trainer.kernels.softmax import HALF
from trainer.ops.adapters.low_rank_products import (
    is_small,
    low_rank_gradients,
    times_columns,
    token_rows,
)
from trainer.ops.adapters.packed_lora import over_four_bits

WORTH_FOLDING = 2**28  # bytes of the matrices that have adapters


class LowRankLinear(Linear):
    """peft's layer with one LoRA or DoRA adapter; peft itself handles all other cases.

    Under autocast LoRA computes in autocast's precision, and DoRA is left to peft.

    folded: W0 with what the adapter adds to it, while `adapters_folded` has it calculated.
    """

    folded: Tensor | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self._plain(x):
            found: Tensor = super().forward(x, *args, **kwargs)
            return found
        layer: Any = self.base_layer
        if self.folded is not None and not torch.is_autocast_enabled(x.device.type):
            return linear(x, self.folded, layer.bias)
        (name,) = self.active_adapters
        first: Any = self.lora_A[name]
        second: Any = self.lora_B[name]
        a, b, scale = first.weight, second.weight, self.scaling[name]
        if name in self.lora_variant:
            length = self.lora_magnitude_vector[name].weight
            result: Tensor = _Dora.apply(x, layer.weight, layer.bias, a, b, length, scale)
            return result
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return _lora(x, layer.weight, layer.bias, a=a, b=b, scale=scale)
        dtype = torch.get_autocast_dtype(device)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        x, weight, a, b = (value.to(dtype) for value in (x, layer.weight, a, b))
        with torch.autocast(device, enabled=False):
            return _lora(x, weight, bias, a=a, b=b, scale=scale)

    @property
    def same_every_step(self) -> bool:
        """Whether it makes the same of the same input at every step of a sampler."""
        return self._alone()

    def whole(self) -> Tensor | None:
        """W0 with what the adapter adds to it, in float32 alone: half precision would lose a small
        B A. None where a weight is not all that it does, and where it is sharded: it is whole
        during the forward alone."""
        from torch.distributed.tensor import DTensor

        layer: Any = self.base_layer
        if not self._alone() or layer.weight.dtype != torch.float32:
            return None
        if isinstance(layer.weight, DTensor):
            return None
        (name,) = self.active_adapters
        a, b = (getattr(self, f"lora_{each}")[name].weight for each in "AB")
        if a.dtype != torch.float32:
            return None
        found: Tensor = torch.addmm(layer.weight, b, a, alpha=self.scaling[name])
        if name in self.lora_variant:
            found *= (self.lora_magnitude_vector[name].weight / found.norm(dim=1))[:, None]
        return found

    def _plain(self, x: Tensor) -> bool:
        """Whether one adapter acts on a frozen layer, without dropout and in one dtype."""
        return self._alone() and self._one_dtype(x, self.active_adapters[0])

    def _alone(self) -> bool:
        """Whether one adapter acts on a frozen layer, without dropout."""
        layer: Any = self.base_layer
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        (name,) = self.active_adapters
        if name not in self.lora_A or self.lora_bias[name]:
            return False
        if not isinstance(self.lora_variant.get(name), DoraLinearVariant | None):
            return False
        dropout = self.lora_dropout[name]
        return bool(
            (isinstance(dropout, nn.Identity) or not self.training)
            and type(layer) is nn.Linear  # others cast their weight themselves
            and not layer.weight.requires_grad
            and not (layer.bias is not None and layer.bias.requires_grad)
        )

    def _one_dtype(self, x: Tensor, name: str) -> bool:
        """Whether input, layer and adapter have one dtype, or autocast gives them one."""
        if torch.is_autocast_enabled(x.device.type):
            return name not in self.lora_variant and x.dtype != torch.float64
        layer: Any = self.base_layer
        return bool(x.dtype == layer.weight.dtype == self.lora_A[name].weight.dtype)


def _lora(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """x (..., c), weight (d, c), bias (d) or None, a (r, c), b (d, r), all of one dtype -> (...,
    d)."""
    if _merges(x, weight) and is_small(weight, a):
        return linear(x, torch.addmm(weight, b, a, alpha=scale), bias)
    result: Tensor = _Lora.apply(x, weight, bias, a, b, scale)
    return result


def quicken(layer: nn.Module) -> None:
    """Turns peft's layer on a plain linear layer, or on one in 4 bits, into one with fewer
    passes; any other stays."""
    if type(layer) is Linear and type(layer.base_layer) is nn.Linear:
        layer.__class__ = LowRankLinear
    elif type(layer).__name__ == "Linear4bit" and is_packed(getattr(layer, "base_layer", layer)):
        layer.__class__ = over_four_bits()


@contextmanager
def adapters_folded(model: nn.Module) -> Iterator[None]:
    """Inside, adapters of which a weight is all that they do are added to a copy of the weight
    once, not at every forward. For a model none of whose weights change meanwhile; one of large
    matrices gains nothing, and its copies would take memory."""
    layers: list[Any] = [each for each in model.modules() if isinstance(each, LowRankLinear)]
    if sum(layer.get_base_layer().weight.nbytes for layer in layers) > WORTH_FOLDING:
        layers = []
    with torch.no_grad():
        for layer in layers:
            layer.folded = layer.whole()
    try:
        yield
    finally:
        for layer in layers:
            layer.folded = None


class _Lora(torch.autograd.Function):
    """x (..., c), weight (d, c), bias (d) or None, a (r, c), b (d, r) -> (..., d)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.scale = scale
        if _merges(x, weight):
            whole = torch.addmm(weight, b, a, alpha=scale)
            ctx.save_for_backward(x, whole, None, a, b)
            return linear(x, whole, bias)
        low = times_columns(a, x)
        ctx.save_for_backward(x, weight, low, a, b)
        y = linear(x, weight, bias)
        token_rows(y).addmm_(low.T, b.T, alpha=scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, low, a, b = ctx.saved_tensors
        need = ctx.needs_input_grad[0]
        on_x, on_a, on_b = low_rank_gradients(
            token_rows(grad), x, weight, low=low, a=a, b=b, scale=ctx.scale, need=need
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
        kept = (whole, None) if _tall(x, weight) else (weight, times_columns(a, x))
        ctx.save_for_backward(x, *kept, a, b, straight, norm, length)
        ctx.scale = scale
        factor = length / norm
        return straight * factor if bias is None else torch.addcmul(bias, straight, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, low, a, b, straight, norm, length = ctx.saved_tensors
        rows, need = token_rows(grad), ctx.needs_input_grad[0]
        on_length = (rows * token_rows(straight)).sum(0) / norm
        on_x, on_a, on_b = low_rank_gradients(
            rows * (length / norm), x, kept, low=low, a=a, b=b, scale=ctx.scale, need=need
        )
        return on_x, None, None, on_a, on_b, on_length, None


def _tall(x: Tensor, weight: Tensor) -> bool:
    """Whether x has more rows than the matrix: then adding B A to the matrix costs less than to
    what comes out of it."""
    return x.numel() // x.shape[-1] >= max(weight.shape)


def _merges(x: Tensor, weight: Tensor) -> bool:
    """Whether LoRA adds s B A to the matrix before the product with x."""
    return x.dtype not in HALF and _tall(x, weight)
