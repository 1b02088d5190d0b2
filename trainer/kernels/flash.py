"""PyTorch's fused attention with a chosen backend, and which backend really ran.

FlashAttention-2 (Dao, arXiv 2307.08691) is in PyTorch: "flash" on CUDA, and as a kernel of its own
on a CPU; "efficient" and "cudnn" are other fused ones, "math" is plain matrix products. PyTorch
chooses by shape, dtype, mask and gradients, and says nothing when it falls back to "math".
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Hashable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.kernels.softmax import sdpa

if TYPE_CHECKING:
    pass


log = logging.getLogger(__name__)

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# the operators that each backend is, as PyTorch dispatches them; the first that is seen tells
DISPATCHED = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash",
    "aten::_scaled_dot_product_flash_attention": "flash",
    "aten::_scaled_dot_product_efficient_attention": "efficient",
    "aten::_scaled_dot_product_cudnn_attention": "cudnn",
    "aten::_scaled_dot_product_fused_attention_overrideable": "overrideable",
    "aten::_scaled_dot_product_attention_math": "math",
    "aten::_safe_softmax": "math",
    "aten::_softmax": "math",
}
ON_CPU = ("flash", "math")


class _Seen(TorchDispatchMode):
    """Watches the operators that reach a device; the composite ones above them are opened."""

    def __init__(self) -> None:
        super().__init__()
        self.backend: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.backend = self.backend or DISPATCHED.get(func._schema.name)
        return func(*args, **(kwargs or {}))


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """SDPA by this backend and no other; None leaves the choice to PyTorch."""
    with nullcontext() if backend is None else sdpa_kernel(BACKENDS[backend]):
        return sdpa(q, k, v, mask, scale)


def observed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, str]:
    """`attend`, and the name of the backend that ran, read from the operators it dispatched.

    Raises:
        ValueError: `backend` cannot take these tensors; says PyTorch's reasons.
    """
    if backend is not None and not q.is_cuda and backend not in ON_CPU:
        raise ValueError(
            f"backend {backend!r} needs CUDA, and this ran on {q.device.type}; choose one of "
            f"{', '.join(ON_CPU)}, or leave the choice to PyTorch with backend=auto"
        )
    with warnings.catch_warnings(record=True) as raised, _Seen() as seen:
        warnings.simplefilter("always")
        try:
            o = flash_attention(q, k, v, mask, scale, backend)
        except RuntimeError as error:
            # anything else than "No available kernel", "No viable backend" is no choice's fault
            if backend is None or not str(error).startswith("No "):
                raise
            raise ValueError(_refusal(q, k, v, mask, backend, raised)) from error
    assert seen.backend is not None, "SDPA dispatched an operator that is not in DISPATCHED"
    if backend not in (None, seen.backend):
        raise ValueError(f"backend {backend!r} was asked for and {seen.backend!r} ran")
    return o, seen.backend


def _refusal(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str, raised: list[Any]
) -> str:
    # "... kernel not used because: (Triggered internally at ...)" opens the list and is no reason
    said = [str(warning.message).partition(" (Triggered internally")[0] for warning in raised]
    reasons = [text.strip() for text in said if not text.strip().endswith("because:")]
    if mask is not None and mask.requires_grad:
        reasons.append("the mask needs a gradient, which no fused kernel but efficient gives.")
    tensors = f"q {describe(q)}, k {describe(k)}, v {describe(v)}, mask {describe(mask)}"
    return (
        f"backend {backend!r} cannot run here, and another would have run in silence: "
        f"{' '.join(reasons) or 'PyTorch gives no reason'} ({tensors}); choose another, or leave "
        "the choice to PyTorch with backend=auto"
    )


def describe(x: Tensor | None) -> str:
    if x is None:
        return "none"
    kind = str(x.dtype).removeprefix("torch.")
    return f"{'x'.join(map(str, x.shape))} {kind} on {x.device.type}"


def backend_of(x: Tensor | None) -> Hashable:
    """All that the choice depends on."""
    if x is None:
        return None
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad and torch.is_grad_enabled()
