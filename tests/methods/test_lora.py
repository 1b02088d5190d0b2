"""LoRA: the equation, peft itself on the same tensors, every start, strengths by layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.methods.apply import Plan, apply_methods
from trainer.methods.weight.lora import Lora
from trainer.ops.adapters.inject import fold

UP = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def add(backbone: Any, **options: Any) -> Plan:
    return apply_methods(backbone, {"lora": Lora(**options)})


def layers(backbone: Any, suffix: str = ".to_k") -> dict[str, Any]:
    """The LoRA layers by name."""
    return {
        name: layer
        for name, layer in backbone.named_modules()
        if hasattr(layer, "lora_A") and name.endswith(suffix)
    }


@pytest.mark.parametrize(
    ("rank", "alpha", "rslora", "strength"),
    [
        pytest.param(3, None, False, 1.0, id="alpha-is-rank"),
        pytest.param(3, 6.0, False, 2.0, id="alpha"),
        pytest.param(5, 2.0, True, 2 / math.sqrt(5), id="rslora"),
    ],
)
def test_the_equation(
    rank: int,
    alpha: float | None,
    rslora: bool,
    strength: float,
    tiny: Any,
    randomise: Callable[..., None],
) -> None:
    plan = add(tiny, sites="cross", rank=rank, alpha=alpha, rslora=rslora)
    randomise(tiny, plan, 0.3)
    layer = dict(tiny.named_modules())[UP]
    a, b = layer.lora_A["lora"].weight, layer.lora_B["lora"].weight
    x = torch.randn(3, 7, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
    own = layer(x)
    naive = x @ (layer.base_layer.weight + strength * b @ a).T
    torch.testing.assert_close(own, naive)
    found = torch.autograd.grad(own.square().sum(), [a, b, x])
    wanted = torch.autograd.grad(naive.square().sum(), [a, b, x])
    for mine, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


def test_output_and_gradients_are_those_of_peft(
    tiny: Any, randomise: Callable[..., None], same_as_peft: Callable[..., None]
) -> None:
    plain = copy.deepcopy(tiny)
    plan = add(tiny, sites="all", rank=4, alpha=8.0)
    randomise(tiny, plan, 0.3)
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=names)
    same_as_peft(tiny, plan, "lora", plain, config)


@pytest.mark.parametrize("method", ["lora", "controls"])
def test_dropout_acts_on_the_input_of_a_and_in_training_alone(
    method: str, tiny: Any, randomise: Callable[..., None]
) -> None:
    """h = W0 x + B A dropout(x), and what the controls of a layer add to that is of it alone."""
    tree = {method: {"sites": "cross", "rank": 3, "dropout": 0.5}}
    randomise(tiny, apply_methods(tiny, methods_of(tree)), 0.3)
    layer = dict(tiny.named_modules())[UP]
    a, b = layer.lora_A[method].weight, layer.lora_B[method].weight
    x = torch.randn(3, 7, 128, generator=torch.Generator().manual_seed(1))
    for training in (True, False):
        layer.train(training)
        torch.manual_seed(5)
        own = layer(x)
        torch.manual_seed(5)
        kept = torch.nn.functional.dropout(x, 0.5, training)
        assert bool((kept == 0).any()) == training
        y = kept @ a.T @ b.T
        if method == "controls":
            y = y + (y @ y.mT).softmax(-1) @ y
        wanted = x @ layer.base_layer.weight.T + y
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_subtracted_start_has_the_strength_of_what_trains(
    init: str, tiny: Any, predict: Callable[[Any], Tensor]
) -> None:
    """W0 - s B0 A0 + s B A, s = alpha / rank = 2, is W0 at the start."""
    base = predict(tiny)
    add(tiny, sites="cross", rank=3, alpha=6.0, init=init)
    torch.testing.assert_close(predict(tiny), base, rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["default", "gaussian", "pissa", "olora", "eva"])
def test_every_start_is_the_base_model_and_leaves_its_weights(
    init: str, tiny: Any, predict: Callable[[Any], Tensor]
) -> None:
    weights = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    base = predict(tiny)
    add(tiny, sites="cross", rank=3, init=init)
    torch.testing.assert_close(predict(tiny), base, rtol=0, atol=1e-5)
    for name, parameter in tiny.named_parameters():
        plain = name.replace(".base_layer.", ".")
        assert plain not in weights or torch.equal(parameter, weights[plain]), name


def test_gaussian_starts_with_a_of_its_spread_and_b_zero(tiny: Any) -> None:
    add(tiny, sites="all", projections=("q",), rank=4, init="gaussian")
    found = layers(tiny, ".to_q").values()
    assert all(not layer.lora_B["lora"].weight.any() for layer in found)
    values = torch.cat([layer.lora_A["lora"].weight.detach().flatten() for layer in found])
    assert float(values.std()) == pytest.approx(1 / 4, rel=0.1)


def test_pissa_starts_at_the_largest_singular_vectors(tiny: Any) -> None:
    add(tiny, sites="cross", projections=("k",), rank=3, alpha=6.0, init="pissa")
    for layer in layers(tiny).values():
        start = 2 * layer.lora_B["lora"].weight @ layer.lora_A["lora"].weight
        u, s, vh = torch.linalg.svd(layer.base_layer.weight, full_matrices=False)
        torch.testing.assert_close(start, u[:, :3] * s[:3] @ vh[:3], rtol=1e-3, atol=1e-5)


def test_olora_starts_at_the_qr_decomposition(tiny: Any) -> None:
    add(tiny, sites="cross", projections=("k",), rank=3, init="olora")
    for layer in layers(tiny).values():
        a, b = layer.lora_A["lora"].weight, layer.lora_B["lora"].weight
        torch.testing.assert_close(b.T @ b, torch.eye(3), rtol=0, atol=1e-5)
        q, r = torch.linalg.qr(layer.base_layer.weight)
        torch.testing.assert_close(b @ a, q[:, :3] @ r[:3], rtol=1e-4, atol=1e-5)


def test_what_pissa_subtracts_stays_while_it_trains(
    tiny: Any, train: Callable[..., list[float]]
) -> None:
    plan = add(tiny, sites="cross", projections=("k",), rank=2, init="pissa")
    kept = {name: p.detach().clone() for name, p in tiny.named_parameters() if name in plan.keeps}
    assert len(kept) == 2 * len(layers(tiny))
    train(tiny, plan)
    parameters = dict(tiny.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in kept.items())


def test_eva_starts_at_what_the_inputs_vary_in_most(
    tiny: Any, predict: Callable[[Any], Tensor]
) -> None:
    plan = add(tiny, sites="cross", projections=("k",), rank=3, init="eva")
    prepare = plan.edits["lora"].prepare
    assert prepare is not None
    seen: list[Tensor] = []
    handle = layers(tiny)[UP].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    base = predict(tiny).detach()
    prepare(lambda: predict(tiny))
    handle.remove()
    inputs = seen[0].detach().flatten(0, -2)
    directions = torch.linalg.svd(inputs.double(), full_matrices=False).Vh[:3].float()
    own = layers(tiny)[UP].lora_A["lora"].weight
    torch.testing.assert_close((own @ directions.T).abs(), torch.eye(3), rtol=0, atol=1e-3)
    assert torch.equal(predict(tiny), base)


def test_ranks_and_strengths_of_single_layers(tiny: Any) -> None:
    add(
        tiny,
        sites="cross",
        projections=("k",),
        rank=2,
        alpha=2.0,
        ranks={"*up_blocks*": 5, "*up_blocks.0*": 3},
        alphas={"*mid_block*": 7.0},
    )
    for name, layer in layers(tiny).items():
        rank = 3 if "up_blocks.0" in name else 5 if "up_blocks" in name else 2
        alpha = 7.0 if "mid_block" in name else 2.0
        assert layer.lora_A["lora"].weight.shape[0] == rank, name
        assert layer.scaling["lora"] == pytest.approx(alpha / rank), name


def test_further_layers_and_the_text_encoder(tiny: Any) -> None:
    plan = add(tiny, sites=None, layers=("*ff.net.2", "conv_in"), text_encoder=("q", "out"), rank=2)
    found = {name.split(".lora_")[0] for name in plan.names}
    assert "unet.conv_in" in found
    assert sum(name.endswith("ff.net.2") for name in found) == len(tiny.sites) // 2
    assert {name.rpartition(".")[2] for name in found if name.startswith("text_encoder")} == {
        "q_proj",
        "out_proj",
    }


def test_folded_into_weights_it_does_the_same(
    tiny: Any, predict: Callable[[Any], Tensor], randomise: Callable[..., None]
) -> None:
    plan = add(tiny, sites="all", layers=("conv_in",), text_encoder=("v",), rank=2)
    randomise(tiny, plan, 0.3)
    live = predict(tiny).detach()
    fold(tiny)
    assert not layers(tiny)
    torch.testing.assert_close(predict(tiny), live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_a_second_method_of_peft_silences_nothing(
    init: str, tiny: Any, predict: Callable[[Any], Tensor]
) -> None:
    tree = {"lora": {"sites": "cross", "rank": 2, "init": init}, "dora": {"sites": "self"}}
    base = predict(tiny)
    plan = apply_methods(tiny, methods_of(tree))
    torch.testing.assert_close(predict(tiny), base, rtol=0, atol=1e-5)
    predict(tiny).square().sum().backward()
    parameters = dict(tiny.named_parameters())
    assert all(parameters[name].grad is not None for name in plan.names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 17}, "rank 17 is above the 16 that unet.down_blocks.0.attentions.0"),
        ({"ranks": {"*attn2.to_k": 200}}, "rank 200 is above the 16 that"),
        ({"ranks": {"*attn3*": 2}}, "'*attn3*' in ranks or alphas matches none of the chosen"),
        ({"sites": None}, "sites, layers, text_encoder and text_layers name no layer"),
        ({"projections": []}, "sites, layers, text_encoder and text_layers name no layer"),
        ({"sites": "temporal"}, "sites: the selector 'temporal' matches no attention site"),
        ({"layers": ["*ff.net.9"]}, "layers: '*ff.net.9' matches no linear or convolution layer"),
        ({"layers": ["conv_in"], "init": "pissa"}, "unet.conv_in is a convolution"),
        ({"layers": ["conv_in"], "init": "eva"}, "unet.conv_in is a convolution"),
    ],
)
def test_refused_with_the_mend(options: dict[str, Any], message: str, tiny: Any) -> None:
    with pytest.raises(ValueError) as error:
        apply_methods(tiny, methods_of({"lora": options}))
    assert str(error.value).startswith("methods.lora: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "crss"}, "did you mean 'cross'"),
        ({"rank": 0}, "methods.lora.rank=0"),
        ({"alpha": 0}, "methods.lora.alpha=0"),
        ({"ranks": {"*": 0}}, "*: 0 is not above 0"),
        ({"init": "pisa"}, "did you mean pissa?"),
        ({"init": "olora", "dropout": 0.1}, "set dropout=0"),
    ],
)
def test_refused_before_loading(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        methods_of({"lora": options})
    assert message in str(error.value)


def test_two_methods_on_one_layer_are_refused(tiny: Any) -> None:
    tree = {"lora": {"sites": "cross"}, "dora": {"sites": "cross & up"}}
    with pytest.raises(ValueError, match=r"methods\.lora and methods\.dora both claim the adapter"):
        apply_methods(tiny, methods_of(tree))


def test_base_layers_are_of_the_model_itself(tiny: Any) -> None:
    before = {id(p) for p in tiny.parameters()}
    add(tiny, sites="cross", rank=2)
    for layer in layers(tiny, "").values():
        assert isinstance(layer.base_layer, nn.Linear)
        assert id(layer.base_layer.weight) in before
