"""The precision that a part's layers are held in: linear ones and convolutions in half precision,
all else in fp32."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from trainer.kernels.softmax import HALF

FP8 = torch.float8_e4m3fn
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # what autocast computes in half precision
PACKED = torch.uint8  # in 4 bits, two values in a byte
# "denoiser" or "text_encoders", what the denoiser is stored in, and the half precision that all of
# the part is stored in, to what the part is read in
ReadIn = Callable[[str, torch.dtype, torch.dtype], torch.dtype]
READ_IN: ContextVar[ReadIn | None] = ContextVar("read", default=None)


@contextmanager
def reading(read_in: ReadIn) -> Iterator[None]:
    """Inside, a part that is stored in half precision is read in what `read_in` says, see
    `Placement.read_in`; outside in fp32, as all others."""
    token = READ_IN.set(read_in)
    try:
        yield
    finally:
        READ_IN.reset(token)


def hold_layers(part: nn.Module, dtype: torch.dtype, stored: Collection[int] = ()) -> None:
    """Rounds the frozen weights and biases of a part's layers; those in 4 bits are integers and
    stay. stored: ids of parameters that stay too."""
    for layer in part.modules():
        if not isinstance(layer, LAYERS) or not layer.weight.is_floating_point():
            continue
        for value in layer.parameters(recurse=False):
            frozen = not value.requires_grad and id(value) not in stored
            other = value.dtype != dtype and value.element_size() >= dtype.itemsize
            if frozen and other:
                value.data = rounded(value.data, dtype)


def only_layers_in(part: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A part that was read in half precision, with its layers in it, some of which a library reads
    in fp32 all the same, and all else in fp32."""
    held = {id(v) for x in part.modules() if isinstance(x, LAYERS) for v in x.parameters(False)}
    for value in (*part.parameters(), *part.buffers()):
        if id(value) in held:
            value.data = value.data.to(dtype)
        elif value.dtype in HALF:
            value.data = value.data.float()
    return part


def rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In a lower precision; ones that were not read stay one number in memory."""
    if is_one_number(value):
        return value[(0,) * value.ndim].to(dtype).expand(value.shape)
    return value.to(dtype)


def is_one_number(value: torch.Tensor) -> bool:
    """Whether a tensor is one number many times, as ones that stand for weights are."""
    return value.numel() > 1 and value.untyped_storage().nbytes() == value.element_size()
