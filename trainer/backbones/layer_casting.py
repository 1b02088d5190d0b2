"""Layers that are held in a lower precision than they compute in, and are cast for every call
(layer-wise casting, as `enable_layerwise_casting` of diffusers): fp8 for bf16, bf16 for fp32.

    y = W.to(x) x + b,    dL/dx = W.to(x)^T dL/dy

The backward casts again: nothing but W itself is kept for it, where autograd would keep W.to(x).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from trainer.backbones.held_layers import FP8, LAYERS, rounded

CONV_INPUT = {1: conv1d_input, 2: conv2d_input, 3: conv3d_input}


def cast_layers(
    part: nn.Module,
    dtype: torch.dtype,
    stored: Collection[int],
    *,
    compute: torch.dtype = torch.float32,
) -> int:
    """Holds the weights of a part's frozen layers in `dtype`; returns how many of them are. Biases
    stay, and layers that the model's class wants in fp32 or uncast; in fp8 norms, positions and
    patches too, as in diffusers. stored: ids of parameters that stay. compute: what the part
    computes in; layers that are not cast and were read in less are put back into it."""
    precise = _precise(part, dtype)
    count = 0
    for name, layer in part.named_modules():
        count += type(layer) in CASTING.values() and layer.weight.dtype == dtype
        kind = CASTING.get(type(layer))
        if kind is None or _is_precise(name, precise):
            continue
        weight = layer.weight
        fits = weight.is_floating_point() and weight.element_size() >= dtype.itemsize
        if fits and not weight.requires_grad and id(weight) not in stored and _plain(layer):
            weight.data = rounded(weight.data, dtype)
            layer.__class__ = kind
            count += 1
    _widen(part, compute)
    return count


def cast_narrow(part: nn.Module, compute: torch.dtype) -> None:
    """Layers that were read in less than the part computes in stay so and are cast at every call,
    but those that the model's class wants uncast, which are put into it: not a value changes."""
    precise = _precise(part, compute)
    for name, layer in part.named_modules():
        if _narrow(layer, compute) and not _is_precise(name, precise):
            layer.__class__ = CASTING[type(layer)]
    _widen(part, compute)


def _is_precise(name: str, precise: Sequence[str]) -> bool:
    """Whether a layer, which an adapter may have wrapped, is one that is not cast."""
    return any(re.search(pattern, name.replace(".base_layer", "")) for pattern in precise)


def _widen(part: nn.Module, compute: torch.dtype) -> None:
    """Layers that are not cast get weights that they can compute with; those in 4 bits, which are
    integers, stay."""
    for layer in part.modules():
        if not isinstance(layer, LAYERS) or type(layer) in CASTING.values():
            continue
        for value in layer.parameters(recurse=False):
            if value.is_floating_point() and value.element_size() < compute.itemsize:
                value.data = rounded(value.data, compute)


def _precise(part: Any, dtype: torch.dtype) -> list[str]:
    """What diffusers leaves out of a model, as regular expressions over the names of layers."""
    own = list(getattr(part, "_skip_layerwise_casting_patterns", None) or ())
    own += getattr(part, "_keep_in_fp32_modules", None) or ()
    if dtype != FP8:
        return own
    # imported here, since it brings peft, and that the compiler of torch: a plan needs neither
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    return [*DEFAULT_SKIP_MODULES_PATTERN, *own]


def _plain(layer: Any) -> bool:
    """Whether nothing of it trains and the gradient of its input is one call."""
    if layer.bias is not None and layer.bias.requires_grad:
        return False
    if isinstance(layer, nn.Linear):
        return True
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


class CastLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _cast(self, x)


class CastConv1d(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return _cast(self, x)


class CastConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return _cast(self, x)


class CastConv3d(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return _cast(self, x)


CASTING: dict[type, Any] = {
    nn.Linear: CastLinear,
    nn.Conv1d: CastConv1d,
    nn.Conv2d: CastConv2d,
    nn.Conv3d: CastConv3d,
}


@contextmanager
def casting(parts: Iterable[nn.Module], compute: torch.dtype) -> Iterator[None]:
    """Inside, frozen layers that were read in less than the parts compute in are cast at every
    call; their weights stay as they are, for methods that are still to read them."""
    narrow = [layer for part in parts for layer in part.modules() if _narrow(layer, compute)]
    kinds = {cast: plain for plain, cast in CASTING.items()}
    for layer in narrow:
        layer.__class__ = CASTING[type(layer)]
    try:
        yield
    finally:
        for layer in narrow:
            layer.__class__ = kinds[type(layer)]


def _narrow(layer: Any, compute: torch.dtype) -> bool:
    """Whether it is frozen, can be cast, and was read in less than `compute`."""
    if type(layer) not in CASTING or not layer.weight.is_floating_point():
        return False
    less = layer.weight.element_size() < compute.itemsize
    return less and not layer.weight.requires_grad and _plain(layer)


def _cast(layer: Any, x: Tensor) -> Tensor:
    """In autocast's precision, or in that of x (..., c)."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            found: Tensor = _Cast.apply(x, layer.weight, layer)
            return found
    found = _Cast.apply(x, layer.weight, layer)
    return found


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.layer, ctx.shape = layer, x.shape
        whole = weight.to(x.dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        if isinstance(layer, nn.Linear):
            return linear(x, whole, bias)
        found: Tensor = layer._conv_forward(x, whole, bias)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        layer, whole = ctx.layer, weight.to(grad.dtype)
        if isinstance(layer, nn.Linear):
            return grad @ whole, None, None
        of_input: Any = CONV_INPUT[weight.ndim - 2]
        how = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return of_input(ctx.shape, whole, grad, *how), None, None
