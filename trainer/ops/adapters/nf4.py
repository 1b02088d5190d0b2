"""Layers stored in 4 bits (NF4), and back.

QLoRA (arXiv 2305.14314): section 3, equations 3 and 4: 64 values share one scale; 256 scales share
one of their own and take 8 bits each: 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a value. The work
is bitsandbytes', on CPU and CUDA; diffusers' own quantiser refuses a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.attention.processor import HostedProcessor


def bitsandbytes(who: str) -> Any:
    """The package; ValueError names who asked and how to install it."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise ValueError(
            f"{who} needs bitsandbytes; pip install 'attention-trainer[qlora]'"
        ) from None
    return bnb


def is_packed(layer: nn.Module) -> bool:
    # by name, so as not to import bitsandbytes to ask; peft's own wrapper is a Linear4bit, too
    kind = type(layer)
    return kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.")


def pack(layer: nn.Linear, compute: torch.dtype) -> nn.Module:
    """A linear layer in 4 bits with the same values, but for rounding; it computes in `compute`."""
    bnb = bitsandbytes("4-bit storage")
    packed = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=compute,
        quant_type="nf4",
        device="meta",
    )
    weight = layer.weight.detach().float()
    packed.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=packed)
    packed.weight = packed.weight.to(weight.device)  # this is where it packs
    packed.weight.module = None  # a copy of the layer would hold on to this one
    if layer.bias is not None:  # bitsandbytes would cast it in place at the first forward
        packed.bias = nn.Parameter(layer.bias.detach().to(compute), requires_grad=False)
    # where a CPU has AVX-512 BF16 it would repack the weight in place, and then compute in bf16
    packed.support_avx512bf16_for_cpu = False
    packed.train(layer.training)
    found: nn.Module = packed
    return found


def share_tables(layers: Sequence[nn.Module]) -> None:
    """One pair of code tables for all 4-bit layers; bitsandbytes gives each its own kilobyte."""
    states: list[Any] = [layer.weight.quant_state for layer in layers]  # type: ignore[union-attr]
    for state in states:
        state.code, state.state2.code = states[0].code, states[0].state2.code


def unpacked(layer: nn.Module) -> nn.Module:
    """A plain linear layer with the values a 4-bit layer computes with; any other layer as it
    is."""
    if not is_packed(layer):
        return layer
    bnb = bitsandbytes("4-bit storage")
    packed: Any = layer
    weight = bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=packed.bias is not None)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if packed.bias is not None:
            plain.bias.copy_(packed.bias)
    return plain.to(weight.device).requires_grad_(False)


def inside_ops(denoiser: nn.Module) -> set[int]:
    """Ids of the modules inside attention ops, which are a method's own and train."""
    processors = [getattr(module, "processor", None) for module in denoiser.modules()]
    hosted = [processor for processor in processors if isinstance(processor, HostedProcessor)]
    ops = [op for processor in hosted for op in processor.ops if isinstance(op, nn.Module)]
    return {id(module) for op in ops for module in op.modules()}


def numel(parameter: Tensor) -> int:
    """Values in a parameter; one in 4 bits holds two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def scales(parameter: Tensor) -> tuple[Tensor, ...]:
    """What a 4-bit parameter is scaled with; none for any other."""
    state = getattr(parameter, "quant_state", None)
    return () if state is None else (state.absmax, state.offset, state.state2.absmax)


def bits_per_value(model: nn.Module) -> float:
    """Bits that a value of the 4-bit layers takes with its scales, by the memory they occupy. The
    two tables of codes, a kilobyte for the model, are not counted.

    Raises:
        ValueError: no layer is stored in 4 bits.
    """
    layers: list[Any] = [layer for layer in model.modules() if is_packed(layer)]
    if not layers:
        raise ValueError("no layer is stored in 4 bits; apply methods.nf4 first")
    parts = [part for layer in layers for part in (layer.weight.data, *scales(layer.weight))]
    size = sum(part.untyped_storage().nbytes() for part in parts)
    return 8 * size / sum(numel(layer.weight) for layer in layers)
