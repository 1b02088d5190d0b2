"""float64 where the device has it, and on the CPU where it has not: Apple's GPUs refuse it."""

from __future__ import annotations

from torch import Tensor


def in_float64(value: Tensor) -> Tensor:
    """The values in float64, on their device or on the CPU; they keep their shape."""
    try:
        return value.double()
    except TypeError:  # what Apple's GPUs answer
        return value.cpu().double()
