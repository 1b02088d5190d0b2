"""Numbers about the weights that train: how large they are, block by block, and how far one step
moves them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

SAMPLED = 2**16  # values of a tensor that are looked at, evenly over it: all of most adapters'
BLOCK = re.compile(r"(.*?\.\d+)\.")  # as down_blocks.1 of down_blocks.1.attentions.0.to_q.weight


@torch.no_grad()
def sampled(values: Mapping[str, Tensor]) -> list[Tensor]:
    """Copies of at most about `SAMPLED` values of each tensor."""
    found = []
    for value in values.values():
        flat = value.detach().flatten()
        found.append(flat[:: max(1, flat.numel() // SAMPLED)].clone())
    return found


@torch.no_grad()
def update_ratio(before: list[Tensor], now: Mapping[str, Tensor]) -> float | None:
    """|w_after - w_before| / |w_before| over all of them, of the values of `sampled`; None where
    all were 0."""
    after = sampled(now)
    if not before:
        return None
    moved = _norm([b.float() - a.float() for a, b in zip(before, after, strict=True)])
    size = _norm(before)
    return moved / size if size > 0 else None


@torch.no_grad()
def block_norms(values: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of all weights of each block."""
    squares: dict[str, float] = {}
    for name, norm in zip(values, _norms(list(values.values())), strict=True):
        block = block_of(name)
        squares[block] = squares.get(block, 0.0) + norm**2
    return {block: square**0.5 for block, square in squares.items()}


def block_of(name: str) -> str:
    """The block of a parameter, by its name in the backbone, as unet.down_blocks.1 or
    transformer.transformer_blocks.7; in a part without numbered blocks its first two words."""
    found = BLOCK.match(name)
    return found[1] if found else ".".join(name.split(".")[:2])


def _norms(values: list[Tensor]) -> list[float]:
    """Of each tensor, calculated together and read at once."""
    if not values:
        return []
    norms = torch._foreach_norm([value.detach().float() for value in values])
    return [float(norm) for norm in torch.stack(norms).tolist()]


def _norm(values: list[Tensor]) -> float:
    """Of all tensors together."""
    return sum(norm**2 for norm in _norms(values)) ** 0.5
