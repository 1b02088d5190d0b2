"""Linear layers stored in 4 bits (NF4), and back; the text encoders of a backbone in them.

QLoRA (arXiv 2305.14314): section 3, equations 3 and 4: 64 values share one scale; 256 scales share
one of their own and take 8 bits each: 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a value. The work
is bitsandbytes', on CPU and CUDA; diffusers' own quantiser refuses a CPU.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.backbones.held_layers import is_one_number

SMALLEST = 4096  # values of a text encoder's layer that is packed
BLOCK, SCALES = 64, 256  # values that share a scale, and scales that share one of their own


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


def can_be_packed(layer: nn.Module, least: int) -> bool:
    """Whether it is a plain linear layer of at least so many values, whose rows are whole blocks:
    of others bitsandbytes reads wrong scales on a CPU
    (`findings/bitsandbytes_cpu_rows_of_part_blocks.sh`)."""
    if type(layer) is not nn.Linear:
        return False
    return layer.weight.numel() >= least and layer.in_features % BLOCK == 0


def pack(layer: nn.Linear, compute: torch.dtype) -> nn.Module:
    """A linear layer in 4 bits with the same values, but for rounding; it computes in `compute`. Of
    one that was not read, whose values are one number, only the sizes are right."""
    bnb = bitsandbytes("4-bit storage")
    packed = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=compute,
        quant_type="nf4",
        device="meta",
    )
    packed.weight = _unread(layer) if is_one_number(layer.weight) else _packed(layer, packed)
    packed.weight.module = None  # a copy of the layer would hold on to this one
    if layer.bias is not None:  # bitsandbytes would cast it in place at the first forward
        packed.bias = nn.Parameter(layer.bias.detach().to(compute), requires_grad=False)
    # where a CPU has AVX-512 BF16 it would repack the weight in place, and then compute in bf16
    packed.support_avx512bf16_for_cpu = False
    packed.train(layer.training)
    found: nn.Module = packed
    return found


def _packed(layer: nn.Linear, packed: nn.Module) -> Any:
    """The weight of a layer as that of `packed`."""
    weight = layer.weight.detach().float()
    found = bitsandbytes("4-bit storage").nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", module=packed
    )
    return found.to(weight.device)  # this is where it packs


def _unread(layer: nn.Linear) -> Any:
    """A weight in 4 bits that takes no memory, as the one number it is made of."""
    bnb = bitsandbytes("4-bit storage")
    one = nn.Linear(BLOCK, SCALES, bias=False)
    one.weight.data.fill_(1.0)
    few: Any = _packed(one, one)
    shape, state = layer.weight.shape, few.quant_state
    blocks = -(-shape.numel() // BLOCK)
    state.shape, state.absmax = shape, state.absmax[:1].expand(blocks)
    state.state2.absmax = state.state2.absmax[:1].expand(-(-blocks // SCALES))
    return bnb.nn.Params4bit(
        few.data[:1].expand(-(-shape.numel() // 2), 1),
        requires_grad=False,
        quant_state=state,
        quant_type="nf4",
        bnb_quantized=True,
    )


def share_tables(layers: Sequence[nn.Module]) -> None:
    """One pair of code tables for all 4-bit layers; bitsandbytes gives each its own kilobyte."""
    states: list[Any] = [layer.weight.quant_state for layer in layers]  # type: ignore[union-attr]
    for state in states:
        state.code, state.state2.code = states[0].code, states[0].state2.code


def values(layer: Any) -> Tensor:
    """The matrix (out, in) that a 4-bit layer computes with, made anew at every call."""
    weight, bnb = layer.weight, bitsandbytes("4-bit storage")
    found: Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return found


def unpacked(layer: nn.Module) -> nn.Module:
    """A plain linear layer with the values a 4-bit layer computes with; any other layer as it
    is."""
    if not is_packed(layer):
        return layer
    packed: Any = layer
    weight = values(layer)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=packed.bias is not None)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if packed.bias is not None:
            plain.bias.copy_(packed.bias)
    return plain.to(weight.device).requires_grad_(False)


def numel(parameter: Tensor) -> int:
    """Values in a parameter; one in 4 bits holds two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def scales(parameter: Tensor) -> tuple[Tensor, ...]:
    """What a 4-bit parameter is scaled with; none for any other."""
    state = getattr(parameter, "quant_state", None)
    return () if state is None else (state.absmax, state.offset, state.state2.absmax)


def pack_layers(part: Any, compute: torch.dtype) -> None:
    """Stores the linear layers of a frozen text encoder in 4 bits, as far as they can be packed,
    have `SMALLEST` values or more and its class does not want them uncast (of a T5 those named
    `wo`).

    Raises:
        ValueError: something of it trains.
    """
    if any(value.requires_grad for value in part.parameters()):
        raise ValueError(
            "run.base_precision.text_encoders=nf4 is for text encoders that do not train, and a "
            "method trains one; leave out this key, or give bf16"
        )
    whole = getattr(part, "_keep_in_fp32_modules", None) or ()
    chosen = {
        name: layer
        for name, layer in part.named_modules()
        if can_be_packed(layer, SMALLEST)
        and not any(re.search(rf"\b{each}\b", name) for each in whole)
    }
    packed = [pack(layer, compute) for layer in chosen.values()]
    if packed:
        share_tables(packed)
    for name, layer in zip(chosen, packed, strict=True):
        part.set_submodule(name, layer)
