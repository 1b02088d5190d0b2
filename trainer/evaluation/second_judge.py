"""The second judge: a small convolutional network that names the sprites of a picture.

The first judge (`judge.py`) is a transformer, and half of the pictures it learned from were bent,
blurred or through the VAE. This one differs in architecture and seed, and saw only clean scenes, so
it does not call a rough shape by the name of a sprite.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.backbones.device import CPU, Placement, place_module
from trainer.evaluation.judge import AT_ONCE, Found

GRID = 8  # cells along a side, each of which is named


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut; `stride` shrinks the picture."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inner), nn.GroupNorm(8, outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        same = inner == outer and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inner, outer, 1, stride=stride)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.conv1(F.relu(self.norm1(hidden)))
        return self.shortcut(hidden) + self.conv2(F.relu(self.norm2(inner)))


class CellNamer(nn.Module):
    """Pictures (n, 3, 64, 64) in [-1, 1] to logits (n, words + 1, 8, 8) of 8x8 cells; the last
    logit is that of an empty cell."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        sizes = [(1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 4, 2), (4, 4, 1), (4, 4, 1)]
        blocks = [Residual(inner * width, outer * width, step) for inner, outer, step in sizes]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(8, 4 * width)
        self.head = nn.Conv2d(4 * width, words + 1, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.blocks(self.stem(pictures)))))


class SecondJudge:
    """Names pictures (n, 3, 64, 64) in [-1, 1], and says where the sprites are.

    folder: `config.json` with the words and the width, and `model.safetensors`; placement: where
    it runs.

    Raises:
        ValueError: the folder holds no such network.
    """

    def __init__(self, folder: Path, placement: Placement = CPU) -> None:
        config = folder / "config.json"
        if not config.is_file():
            raise ValueError(f"second judge {folder}: it has no config.json")
        facts = json.loads(config.read_text(encoding="utf-8"))
        self.folder, self.words = folder, tuple(facts["words"])
        self.network = CellNamer(len(self.words), facts["width"])
        weights = load_file(folder / "model.safetensors")
        self.network.load_state_dict({key: value.float() for key, value in weights.items()})
        place_module(self.network.eval().requires_grad_(False), placement)
        self.device = placement.device

    def named(self, pictures: Tensor, words: Sequence[str]) -> list[str]:
        """The word of `words` with the most cells, for each picture."""
        return [row[0] for row in self.found(pictures, words).top(1)]

    @torch.no_grad()
    def found(self, pictures: Tensor, words: Sequence[str]) -> Found:
        """How many cells of each picture show each word, and where.

        Raises:
            ValueError: it does not know one of the words.
        """
        strange = [word for word in words if word not in self.words]
        if strange:
            raise ValueError(f"second judge {self.folder} does not know {', '.join(strange)}")
        columns = [*(self.words.index(word) for word in words), len(self.words)]
        parts = pictures.float().split(AT_ONCE)
        logits = [self.network(part.to(self.device)).cpu() for part in parts]
        shares = torch.cat(logits)[:, columns].softmax(1)[:, :-1].flatten(2)
        return Found.of_shares(words, shares.transpose(1, 2))
