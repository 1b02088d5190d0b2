"""What the ranks of a run tell each other, and how what is sharded over them becomes whole; with
one process, each function returns what it got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

Kind = TypeVar("Kind", bound=Tensor)


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


def mean_of_ranks(own: Tensor) -> Tensor:
    """The elementwise mean over all ranks, on every rank."""
    own = own.clone()
    torch.distributed.all_reduce(own)  # gloo has no mean
    return own / num_ranks()


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, sharded ones or not; every rank must call this."""
    kinds = [part for part in by_kind(gradients) if part]
    if len(kinds) < 2:
        return whole_tensor(torch.nn.utils.get_total_norm(list(gradients)))
    norms = [whole_tensor(torch.nn.utils.get_total_norm(part)) for part in kinds]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))


def clip_gradients(values: Sequence[Tensor], largest_norm: float, norm: Tensor) -> None:
    """Scales the gradients of parameters, sharded ones or not, whose norm together is `norm`."""
    for part in filter(None, by_kind(values)):
        torch.nn.utils.clip_grads_with_norm_(part, largest_norm, norm)


def by_kind(values: Sequence[Kind]) -> tuple[list[Kind], list[Kind]]:
    """Those that are not sharded, and those that are: no operation takes both."""
    plain = [value for value in values if not isinstance(value, DTensor)]
    return plain, [value for value in values if isinstance(value, DTensor)]


def reshard(model: nn.Module) -> None:
    """Leaves each rank its part of what is whole at the moment, of a model that is sharded."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(value: Tensor) -> bool:
    """Whether this rank has only a part of it."""
    return isinstance(value, DTensor)


def local_part(value: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded, which shares its memory."""
    found: Tensor = value.to_local() if isinstance(value, DTensor) else value
    return found


def whole_tensor(value: Tensor, keep: bool = True) -> Tensor:
    """A tensor that may be sharded over the ranks (`sharding.py`), whole; every rank must call
    this. keep: whether this rank wants it; others get an empty one, which spares their memory."""
    if not isinstance(value, DTensor):
        return value
    found: Tensor = value.full_tensor().detach()
    return found if keep else found.new_empty(0)


def whole_tree(tree: Any, keep: bool = True) -> Any:
    """A tree of mappings, lists and tuples, every sharded tensor in it whole and on the CPU. keep:
    see `whole_tensor`."""
    if isinstance(tree, DTensor):
        return whole_tensor(tree, keep).cpu()
    if isinstance(tree, Mapping):
        return {key: whole_tree(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole_tree(value, keep) for value in tree)
    return tree


def as_sharded(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, where `like` is sharded and of its shape; every rank must
    call this with the same one."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    own = value.to(device=like.device, dtype=value.dtype)
    return distribute_tensor(own, like.device_mesh, like.placements)


def shard_state(optimizer: torch.optim.Optimizer) -> None:
    """The whole moments of sharded parameters become sharded as these are."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                state[name] = as_sharded(value, parameter)


def summed(own: Tensor) -> Tensor:
    """The elementwise sum over all ranks, on every rank; on the device the ranks talk through."""
    if num_ranks() > 1:
        own = own.clone()
        torch.distributed.all_reduce(own, op=torch.distributed.ReduceOp.SUM)
    return own
