"""Numbers about the weights that train: how large they are, block by block, and how far one step
moves them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.training.distributed import is_sharded, local_part, summed

SAMPLED = 2**16  # values of a tensor that are looked at, evenly over it: all of most adapters'
BLOCK = re.compile(r"(.*?\.\d+)\.")  # as down_blocks.1 of down_blocks.1.attentions.0.to_q.weight


@torch.no_grad()
def sampled(values: Mapping[str, Tensor]) -> list[Tensor]:
    """Copies of at most about `SAMPLED` values of each tensor, of a sharded one of this rank's
    part."""
    found = []
    for value in values.values():
        flat = local_part(value.detach()).flatten()
        found.append(flat[:: max(1, flat.numel() // SAMPLED)].clone())
    return found


@torch.no_grad()
def update_ratio(before: list[Tensor], now: Mapping[str, Tensor]) -> float | None:
    """|w_after - w_before| / |w_before| over all of them, of the values of `sampled`; None where
    all were 0. Every rank must call this."""
    pairs = zip(before, sampled(now), strict=True)
    moved = [after.float() - was.float() for was, after in pairs]
    like = list(now.values())
    size = sum(_squares(before, like))
    return (sum(_squares(moved, like)) / size) ** 0.5 if size > 0 else None


@torch.no_grad()
def block_norms(values: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of all weights of each block. Every rank must call this."""
    like = list(values.values())
    squares: dict[str, float] = {}
    own = _squares([local_part(value.detach()) for value in like], like)
    for name, square in zip(values, own, strict=True):
        block = block_of(name)
        squares[block] = squares.get(block, 0.0) + square
    return {block: square**0.5 for block, square in squares.items()}


def block_of(name: str) -> str:
    """The block of a parameter, by its name in the backbone, as unet.down_blocks.1 or
    transformer.transformer_blocks.7; in a part without numbered blocks its first two words."""
    found = BLOCK.match(name)
    return found[1] if found else ".".join(name.split(".")[:2])


def _squares(values: list[Tensor], like: list[Tensor]) -> list[float]:
    """The squared norm of each tensor, calculated together and read at once; of one whose `like` is
    sharded over all ranks."""
    if not values:
        return []
    own = torch.stack(torch._foreach_norm([value.float() for value in values])).square()
    shared = torch.tensor([is_sharded(value) for value in like], device=own.device)
    whole = summed(own) if any(map(is_sharded, like)) else own
    return [float(square) for square in torch.where(shared, whole, own).tolist()]
