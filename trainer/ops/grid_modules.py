"""Trained modules on the token grid of an image: biases of agents, and a depthwise convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kernels.token_merging import Grid

BLOCK, LINE = 7, 32  # cells of the two parts of a bias, interpolated to the grid


class AgentBias(nn.Module):
    """A bias of every agent at every position of the grid, for one of the two steps: a coarse map,
    a column and a row, each interpolated to the grid. Zero at the start (arXiv 2312.08874, section
    3.3)."""

    def __init__(self, heads: int, agents: int) -> None:
        super().__init__()
        self.block = nn.Parameter(torch.zeros((heads, agents, BLOCK, BLOCK)))
        self.down = nn.Parameter(torch.zeros(heads, agents, LINE))
        self.across = nn.Parameter(torch.zeros(heads, agents, LINE))

    def forward(self, grid: Grid) -> Tensor:
        """The bias (heads, agents, n)."""
        block = F.interpolate(self.block, size=grid, mode="bilinear")
        down = F.interpolate(self.down, size=grid[0], mode="linear")
        across = F.interpolate(self.across, size=grid[1], mode="linear")
        return (block + down[..., None] + across[..., None, :]).flatten(2)


class Shortcut(nn.Module):
    """A depthwise convolution of the values on their grid, added to an attention of low rank, which
    loses local detail. Zero at the start."""

    def __init__(self, channels: int, size: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((channels, 1, size, size)))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, v: Tensor, grid: Grid) -> Tensor:
        """v and the result (b, h, n, d)."""
        batch, heads, _, width = v.shape
        image = v.transpose(2, 3).reshape(batch, -1, *grid)
        padding = self.weight.shape[-1] // 2
        image = F.conv2d(image, self.weight, self.bias, padding=padding, groups=image.shape[1])
        return image.unflatten(1, (heads, width)).flatten(3).transpose(2, 3).to(v.dtype)
