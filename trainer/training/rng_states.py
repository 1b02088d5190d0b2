"""The states of the random number generators that a checkpoint keeps for each rank."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def get_rng_states(device: torch.device) -> dict[str, Any]:
    """The states of this rank's random number generators, of the CPU and of its device, in types
    that `torch.load` reads with weights_only."""
    found = np.random.get_state(legacy=False)
    inner = {**found["state"], "key": torch.from_numpy(found["state"]["key"].astype(np.int64))}
    states = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": {**found, "state": inner},
    }
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_rng_states(states: Mapping[str, Any]) -> None:
    """The inverse of `get_rng_states`."""
    torch.set_rng_state(states["torch"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    inner = states["numpy"]["state"]
    inner = {**inner, "key": inner["key"].numpy().astype(np.uint32)}
    np.random.set_state({**states["numpy"], "state": inner})
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
