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
    moved = _norm([b.float() - a.float() for a, b in zip(before, after, strict=True)])
    size = _norm(before)
    return moved / size if size > 0 else None


@torch.no_grad()
def block_norms(values: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of all weights of each block."""
    blocks: dict[str, list[Tensor]] = {}
    for name, value in values.items():
        blocks.setdefault(block_of(name), []).append(value.detach())
    return {block: _norm(own) for block, own in blocks.items()}


def block_of(name: str) -> str:
    """The block of a parameter, by its name in the backbone, as unet.down_blocks.1 or
    transformer.transformer_blocks.7; in a part without numbered blocks its first two words."""
    found = BLOCK.match(name)
    return found[1] if found else ".".join(name.split(".")[:2])


def _norm(values: list[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(value.float()) for value in values]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
