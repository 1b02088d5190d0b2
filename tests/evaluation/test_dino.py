"""DINO judges: the features are those of the model itself, and other models are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPImageProcessorPil, Dinov2Model, ViTModel

from trainer.evaluation.dino import Dino
from trainer.media.images import to_pil

MEAN, STD = CLIPImageProcessorPil.image_mean, CLIPImageProcessorPil.image_std  # of DINOv2's, too


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 32, 32, generator=generator) * 2 - 1


def pixels(pictures: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """In eight bits a colour, from 0 to 1, and normalised; their size is the model's already."""
    shares = ((pictures + 1) * 127.5).round() / 255
    return (shares - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@torch.no_grad()
def test_of_dinov2_the_token_of_the_picture(dino_folder: Path, pictures: Tensor) -> None:
    judge, model = Dino(dino_folder), Dinov2Model.from_pretrained(dino_folder)
    wanted = model.eval()(pixels(pictures, MEAN, STD)).pooler_output
    found = judge.features(pictures)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert judge.kind == "DINO" and not torch.allclose(found[0], found[1], atol=1e-3)


@torch.no_grad()
def test_of_dino_the_same(vit_folder: Path, pictures: Tensor) -> None:
    model = ViTModel.from_pretrained(vit_folder, add_pooling_layer=False)
    half = [0.5, 0.5, 0.5]
    wanted = model.eval()(pixels(pictures, half, half)).last_hidden_state[:, 0]
    torch.testing.assert_close(Dino(vit_folder).features(pictures), wanted, rtol=1e-3, atol=1e-3)


def test_what_is_no_judge_is_refused(dino_folder: Path, vit_folder: Path, tmp_path: Path) -> None:
    def changed(folder: Path, name: str, **keys: object) -> Path:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | keys))
        return copy

    named = changed(vit_folder, "names", architectures=["ViTForImageClassification"])
    with pytest.raises(ValueError, match="a vit that classifies pictures is no judge"):
        Dino(named)
    with pytest.raises(ValueError, match="a siglip is no judge; give the folder of a CLIP, a DINO"):
        Dino(changed(vit_folder, "other", model_type="siglip"))
    empty = changed(dino_folder, "empty")
    weights = load_file(empty / "model.safetensors")
    lacking = {name: value for name, value in weights.items() if "layernorm.bias" not in name}
    save_file(lacking, empty / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights lack layernorm\.bias"):
        Dino(empty)
    (empty / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no preprocessor_config\.json; the folder of a"):
        Dino(empty)


def test_pictures_of_any_size(dino_folder: Path, pictures: Tensor) -> None:
    judge = Dino(dino_folder)
    large = torch.nn.functional.interpolate(pictures[:1], scale_factor=2, mode="nearest")[0]
    both = judge.features([large, pictures[1]])
    torch.testing.assert_close(both[1], judge.features(pictures)[1])
    assert to_pil(large).size == (64, 64) and both.shape == (2, 16)
