"""Recipes that train a network from nothing: what they store is all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.backbones import load_backbone
from trainer.config.load import load_recipe
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_adapted, save_adapter
from trainer.training.memory_estimate import memory_of


def predict(model: Any) -> Tensor:
    x_t = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(3))
    condition = model.encode_prompts(["a fox", ""])
    with torch.no_grad():
        output: Tensor = model.predict(x_t, torch.tensor([3.0, 900.0]), condition)
    return output


@pytest.mark.parametrize(("name", "kernels"), [("sana_scratch", 0), ("dig_scratch", 7)])
def test_an_adapter_rebuilds_the_network(name: str, kernels: int, tmp_path: Path) -> None:
    """From other random weights than it was trained from."""
    recipe = load_recipe([f"recipe={name}"])
    torch.manual_seed(1)
    model = load_backbone(recipe.backbone, recipe.backbone_name).eval()
    plan = apply_methods(model, recipe.methods)
    processors = model.host.processors.values()
    assert sum(bool(processor.stages["kernel"]) for processor in processors) == kernels
    assert memory_of(recipe, model, plan).peak > 4 * 4 * plan.trained
    own = dict(model.named_parameters())
    assert set(plan.names) == {key for key in own if key.startswith("transformer.")}
    model.requires_grad_(False)
    for key in plan.names:
        own[key].add_(0.02 * torch.randn_like(own[key]))
    wanted = predict(model)
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, {key: own[key] for key in plan.stored}, recipe.tree, model.identity())
    torch.manual_seed(2)
    again, _ = load_adapted(path)
    assert wanted.any() and torch.equal(predict(again), wanted)
