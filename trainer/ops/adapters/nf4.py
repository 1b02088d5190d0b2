"""What is asked of a network whose layers are stored in 4 bits (NF4), see
`trainer/backbones/four_bits.py`."""

from __future__ import annotations

from typing import Any

from torch import nn

from trainer.attention.processor import HostedProcessor
from trainer.backbones.four_bits import is_packed, numel, scales


def inside_ops(denoiser: nn.Module) -> set[int]:
    """Ids of the modules inside attention ops, which are a method's own and train."""
    processors = [getattr(module, "processor", None) for module in denoiser.modules()]
    hosted = [processor for processor in processors if isinstance(processor, HostedProcessor)]
    ops = [op for processor in hosted for op in processor.ops if isinstance(op, nn.Module)]
    return {id(module) for op in ops for module in op.modules()}


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
