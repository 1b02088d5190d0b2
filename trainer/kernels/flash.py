"""PyTorch's fused attention with a chosen backend, and the name of the backend that ran.

PyTorch has FlashAttention-2 (Dao, arXiv 2307.08691) as "flash", with separate kernels for CUDA and
CPU; "efficient" and "cudnn" are other fused kernels, "math" is plain matrix products. PyTorch
chooses by shape, dtype, mask and gradients, and does not report when it uses "math".
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Hashable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.kernels.softmax import sdpa

log = logging.getLogger(__name__)

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# the backend of each operator that PyTorch dispatches; the first one seen is the backend that ran
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
    """Records the backend of the first operator in `DISPATCHED` that reaches a device."""

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
    """Attention (b, h, n, d) by this backend only; None lets PyTorch choose."""
    with nullcontext() if backend is None else sdpa_kernel(BACKENDS[backend]):
        return sdpa(q, k, v, mask=mask, scale=scale)


def observed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, str]:
    """`flash_attention`, and the name of the backend that ran.

    Raises:
        ValueError: `backend` cannot take these tensors; the message has PyTorch's reasons.
    """
    if backend is not None and not q.is_cuda and backend not in ON_CPU:
        raise ValueError(
            f"backend {backend!r} needs CUDA, and these tensors are on {q.device.type}; choose one "
            f"of {', '.join(ON_CPU)}, or let PyTorch choose with backend=auto"
        )
    with warnings.catch_warnings(record=True) as raised, _Seen() as seen:
        warnings.simplefilter("always")
        try:
            o = flash_attention(q, k, v, mask=mask, scale=scale, backend=backend)
        except RuntimeError as error:
            # only "No available kernel" and "No viable backend" are caused by the choice
            if backend is None or not str(error).startswith("No "):
                raise
            tensors = {"q": q, "k": k, "v": v, "mask": mask}
            raise ValueError(_refusal(tensors, backend=backend, raised=raised)) from error
    assert seen.backend is not None, "SDPA dispatched an operator that is not in DISPATCHED"
    if backend not in (None, seen.backend):
        raise ValueError(f"backend {backend!r} was asked for and {seen.backend!r} ran")
    return o, seen.backend


def _refusal(tensors: Mapping[str, Tensor | None], *, backend: str, raised: list[Any]) -> str:
    # "... kernel not used because: (Triggered internally at ...)" is a heading, not a reason
    texts = [str(warning.message).partition(" (Triggered internally")[0] for warning in raised]
    reasons = [text.strip() for text in texts if not text.strip().endswith("because:")]
    mask = tensors["mask"]
    if mask is not None and mask.requires_grad:
        reasons.append("the mask needs a gradient, which only the fused kernel efficient gives.")
    listed = ", ".join(f"{name} {describe(value)}" for name, value in tensors.items())
    return (
        f"backend {backend!r} cannot run here, and PyTorch would use another one: "
        f"{' '.join(reasons) or 'PyTorch gives no reason'} ({listed}); choose another, or let "
        "PyTorch choose with backend=auto"
    )


def describe(x: Tensor | None) -> str:
    """Shape, dtype and device, as in "2x8x64x40 float32 on cpu"; "none" for None."""
    if x is None:
        return "none"
    kind = str(x.dtype).removeprefix("torch.")
    return f"{'x'.join(map(str, x.shape))} {kind} on {x.device.type}"


def backend_of(x: Tensor | None) -> Hashable:
    """What PyTorch's choice of a backend depends on."""
    if x is None:
        return None
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad and torch.is_grad_enabled()
