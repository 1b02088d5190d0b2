"""Very small random DINO models, and folders of photographs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from trainer.data.world.scenes import draw_scene

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}


@pytest.fixture(scope="session")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 that takes pictures of 32 pixels, as transformers saves it."""
    folder = tmp_path_factory.mktemp("judges") / "dino"
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SMALL, patch_size=8, mlp_ratio=2)).save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINO of the first kind, a ViT without a head."""
    folder = tmp_path_factory.mktemp("judges") / "vit"
    torch.manual_seed(1)
    config = ViTConfig(**SMALL, patch_size=8, intermediate_size=32)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def photographs(tmp_path: Path) -> Callable[..., Path]:
    """`photographs(word, count)`: a folder of scenes of one sprite, without captions."""

    def make(word: str, count: int, seed: int = 3) -> Path:
        folder = tmp_path / f"{word}-{seed}"
        folder.mkdir()
        for index in range(count):
            scene = Image.fromarray(draw_scene(seed, index, (word,), count=1).image)
            scene.save(folder / f"{index}.png")
        return folder

    return make
