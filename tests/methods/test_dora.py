"""DoRA: the equation with its constant norm, peft itself on the same tensors, the start."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from trainer.config.load import methods_of
from trainer.methods.apply import Plan, apply_methods
from trainer.methods.weight.dora import Dora
from trainer.ops.adapters.inject import fold

UP = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def add(backbone: Any, **options: Any) -> Plan:
    return apply_methods(backbone, {"dora": Dora(**options)})


def test_the_equation_with_a_norm_that_is_constant_to_the_gradient(
    tiny: Any, randomise: Callable[..., None]
) -> None:
    randomise(tiny, add(tiny, sites="cross", rank=3, alpha=6.0))
    layer = dict(tiny.named_modules())[UP]
    a, b = layer.lora_A["dora"].weight, layer.lora_B["dora"].weight
    m = layer.lora_magnitude_vector["dora"].weight
    x = torch.randn(3, 7, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
    direction = layer.base_layer.weight + 2 * b @ a
    naive = x @ (m[:, None] * direction / direction.norm(dim=1, keepdim=True).detach()).T
    own = layer(x)
    torch.testing.assert_close(own, naive, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(own.square().sum(), [a, b, m, x])
    wanted = torch.autograd.grad(naive.square().sum(), [a, b, m, x])
    for mine, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("init", "spread"), [("gaussian", 1 / 4), ("default", 1 / (3 * 128) ** 0.5)]
)
def test_a_starts_as_its_option_says(init: Any, spread: float, tiny: Any) -> None:
    """Normal of deviation 1 / rank, or Kaiming's uniform start as in LoRA's code; B is zero."""
    plan = add(tiny, sites="cross", projections=("k", "v"), rank=4, init=init)
    parameters = dict(tiny.named_parameters())
    downs = [parameters[name].detach().flatten() for name in plan.names if ".lora_A." in name]
    ups = [parameters[name] for name in plan.names if ".lora_B." in name]
    assert len(downs) == len(ups) == 14
    assert float(torch.cat(downs).std()) == pytest.approx(spread, rel=0.1)
    assert not any(bool(up.any()) for up in ups)


def test_magnitude_starts_as_the_norm_of_each_row(tiny: Any) -> None:
    plan = add(tiny, sites="cross", rank=2)
    parameters = dict(tiny.named_parameters())
    magnitudes = [name for name in plan.names if "magnitude" in name]
    assert len(magnitudes) * 3 == len(plan.names)
    for name in magnitudes:
        weight = parameters[name.partition(".lora_magnitude")[0] + ".base_layer.weight"]
        torch.testing.assert_close(parameters[name], weight.norm(dim=1))


def test_output_and_gradients_are_those_of_peft(
    tiny: Any, randomise: Callable[..., None], same_as_peft: Callable[..., None]
) -> None:
    plain = copy.deepcopy(tiny)
    plan = add(tiny, sites="all", projections=("q", "v"), rank=4)
    randomise(tiny, plan)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], use_dora=True)
    same_as_peft(tiny, plan, "dora", plain, config)


def test_base_weights_stay_through_training(tiny: Any, train: Callable[..., list[float]]) -> None:
    weights = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    train(tiny, add(tiny, sites="cross", rank=2))
    for name, parameter in tiny.named_parameters():
        plain = name.replace(".base_layer.", ".")
        assert plain not in weights or torch.equal(parameter, weights[plain]), name


def test_folded_into_weights_it_does_the_same(
    tiny: Any, predict: Callable[[Any], Tensor], randomise: Callable[..., None]
) -> None:
    randomise(tiny, add(tiny, sites="all", rank=2, text_encoder=("q",)))
    live = predict(tiny).detach()
    fold(tiny)
    torch.testing.assert_close(predict(tiny), live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 17}, "rank 17 is above the 16 that unet.down_blocks.0.attentions.0"),
        ({"layers": ["*nothing"]}, "layers: '*nothing' matches no linear or convolution layer"),
        ({"sites": None}, "sites, layers, text_encoder and text_layers name no layer"),
    ],
)
def test_refused_with_the_mend(options: dict[str, Any], message: str, tiny: Any) -> None:
    with pytest.raises(ValueError) as error:
        apply_methods(tiny, methods_of({"dora": options}))
    assert str(error.value).startswith("methods.dora: ")
    assert message in str(error.value)
