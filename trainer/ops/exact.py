"""float64 where the device has it, and on the CPU where it has not: Apple's GPUs refuse it."""

from __future__ import annotations

import torch
from torch import Tensor


def has_float64(device: torch.device) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def in_float64(value: Tensor) -> Tensor:
    """The values in float64, on their device or on the CPU; they keep their shape."""
    return value.double() if has_float64(value.device) else value.cpu().double()
