"""What is read from adapted layers, against the deltas that peft itself computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from trainer.export.bundle import LowRankDelta
from trainer.export.extract import extract


def model_of(linear: nn.Module) -> Any:
    """A model whose denoiser has one layer."""
    denoiser = nn.ModuleDict({"layer": linear})
    return SimpleNamespace(
        denoiser_name="unet",
        denoiser=denoiser,
        text_encoders={},
        get_submodule=lambda name: denoiser,
        named_parameters=lambda: denoiser.named_parameters(prefix="unet"),
    )


def test_two_adapters_of_one_layer_are_summed() -> None:
    torch.manual_seed(0)
    adapted, base = nn.Linear(5, 7), nn.Linear(5, 7)
    base.load_state_dict(adapted.state_dict())
    model = model_of(adapted)
    for name, rank, alpha in (("one", 2, 6), ("two", 3, 3)):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"])
        inject_adapter_in_model(config, model.denoiser, name)
    layer: Any = model.denoiser["layer"]
    layer.set_adapter(["one", "two"])
    for name in ("one", "two"):
        nn.init.normal_(layer.lora_B[name].weight)
    stored = [f"unet.{name}" for name, _ in model.denoiser.named_parameters() if "lora_" in name]
    bundle = extract(model, model_of(base), stored)
    (delta,) = bundle.layers.values()
    assert isinstance(delta, LowRankDelta) and (delta.rank, delta.scale) == (5, 1.0)
    wanted = sum(layer.get_delta_weight(name) for name in ("one", "two"))
    torch.testing.assert_close(delta.up @ delta.down, wanted)
    assert bundle.dropped == ()
