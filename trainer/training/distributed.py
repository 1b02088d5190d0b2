"""What the ranks of a run tell each other; with one process, each function returns what it got."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def num_ranks() -> int:
    """The processes of this run, 1 outside of one that has several."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def gather_values(own: Any) -> list[Any]:
    """The plain value of every rank, in their order, on every rank."""
    if num_ranks() == 1:
        return [own]
    everyone: list[Any] = [None] * num_ranks()
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def value_of_first(own: Any) -> Any:
    """The plain value of the first rank, on every rank."""
    if num_ranks() == 1:
        return own
    shared = [own]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]


def largest(own: Tensor) -> Tensor:
    """The elementwise maximum over all ranks (n,), on every rank; on the device the ranks talk
    through."""
    if num_ranks() > 1:
        own = own.clone()
        torch.distributed.all_reduce(own, op=torch.distributed.ReduceOp.MAX)
    return own
