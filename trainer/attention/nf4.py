"""Layers stored in 4 bits (NF4), and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def unpacked(layer: nn.Module) -> nn.Module:
    """A plain linear layer with the values a 4-bit layer computes with; any other layer as it
    is."""
    if type(layer).__name__ != "Linear4bit":
        return layer
    import bitsandbytes as bnb

    packed: Any = layer
    weight = bnb.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=packed.bias is not None)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if packed.bias is not None:
            plain.bias.copy_(packed.bias)
    return plain.to(weight.device).requires_grad_(False)
