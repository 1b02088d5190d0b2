"""Model FLOPs of a training step, counted operation by operation as the step runs, and the share of
the device's rate that they are (MFU, arXiv 2204.02311, appendix B).

A matrix product of n multiply-adds has 2 n floating point operations: 2 n in the forward, 2 n for
the gradient of its input, 2 n for that of its weight. Counted is what is calculated: a frozen layer
has no gradient of its weight, and a layer before the first that trains has no backward. So a step
of an adapter has 2 n to 4 n in place of the 6 n of full training. What checkpointing calculates
again is no work of the model and is left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(*(each.shape for each in (grad, q, k, v)))


FORMULAS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # torch knows CUDA's alone
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class FlopCount(TorchDispatchMode):
    """Counts the operations of what runs inside: a context, or between `begin` and `end`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def begin(self) -> None:
        self.__enter__()

    def end(self) -> int:
        """The operations that were counted."""
        self.__exit__(None, None, None)
        return self.total

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None and not calculated_again():
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


def is_compiled(model: nn.Module) -> bool:
    """Whether a part of a model is compiled: then its operations cannot be counted."""
    return any(part._compiled_call_impl is not None for part in model.modules())


def calculated_again() -> bool:
    """Whether checkpointing is at work: inside a backward, which itself has no gradients of its
    own, something is calculated that has."""
    return torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()


# of the data sheets, for one GPU and dense matrices, where Lightning's table has another rate: that
# of a pair for the H100 NVL, and that of sparse matrices for the H200
DENSE: Mapping[str, Mapping[torch.dtype, float]] = {
    "h100 nvl": {torch.bfloat16: 835e12, torch.float16: 835e12},
    "h200 nvl": {torch.bfloat16: 835e12, torch.float16: 835e12},
    "h200": {torch.bfloat16: 989e12, torch.float16: 989e12},
}


def peak_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second that a device can do at most in a precision; None where it is not
    known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    for chip, rates in DENSE.items():
        if chip in name and dtype in rates:
            return rates[dtype]
    from lightning.fabric.utilities.throughput import get_available_flops

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not know the device
        found = get_available_flops(device, dtype)
    return None if found is None else float(found)
