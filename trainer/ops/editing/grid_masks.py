"""Masks of pictures at the token grids of attention layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def on_grid(mask: Tensor, grid: tuple[int, int], rows: int) -> Tensor:
    """A mask (1, 1, H, W) of 0 to 1 at a grid, (rows, h w) of bool: a token is inside where at
    least half of it is."""
    found = F.adaptive_avg_pool2d(mask.float(), grid) >= 0.5
    return found.flatten(1).expand(rows, -1)


def seen_or_all(keys: Tensor) -> Tensor:
    """Keys (rows, m) of bool that a query may see: all, where it would see none."""
    return keys | ~keys.any(1, keepdim=True)
