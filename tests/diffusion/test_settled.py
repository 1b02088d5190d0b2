"""What is calculated once for all steps of a sampler, and what is not."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.config.load import methods_of
from trainer.diffusion import sampler
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods
from trainer.ops.adapters import fused_lora

SETTINGS = Sampling(3, 4.0)


def sampled(model: Any) -> Tensor:
    return sampler.sample(model, ["a fox", "a cat"], [0, 1], settings=SETTINGS)


def unsettled(model: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "settled", lambda backbone: nullcontext())
        return sampled(model)


def counted(model: Any) -> dict[str, int]:
    """How often the text goes through `to_k` of each cross-attention, from now on. No hook counts:
    who watches a layer sees every call of it."""
    calls: dict[str, int] = {}
    for site in model.sites:
        if site.kind == "cross":
            layer, name = site.module.to_k, site.name
            calls[name] = 0

            def forward(x: Tensor, inner: Any = layer.forward, name: str = name) -> Any:
                calls[name] += 1
                return inner(x)

            layer.forward = forward
    return calls


def edited(model: Any, tree: Mapping[str, Any]) -> Any:
    """The model with methods whose tensors do something."""
    plan = apply_methods(model, methods_of(tree))
    torch.manual_seed(0)
    for name in plan.names:
        value = model.get_parameter(name)
        value.data += 0.1 * torch.randn_like(value)
    return model.requires_grad_(False)


def test_the_text_is_projected_once_and_the_picture_is_the_same_bit_for_bit(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = unsettled(tiny, monkeypatch)
    calls = counted(tiny)
    assert torch.equal(sampled(tiny), before)
    assert set(calls.values()) == {1}
    sampled(tiny)
    assert set(calls.values()) == {2}  # nothing is kept for another call
    assert tiny.host.holder.kept is None


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_are_folded_meanwhile_and_no_tensor_changes(
    method: str, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = edited(tiny, {method: {"rank": 2}})
    before = {name: value.clone() for name, value in model.named_parameters()}
    wanted, calls = unsettled(model, monkeypatch), counted(model)
    found = sampled(model)
    assert set(calls.values()) == {1}
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert torch.equal(unsettled(model, monkeypatch), wanted)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_folded_layer_is_the_matrix_of_what_it_computed(
    method: str, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = edited(tiny, {method: {"rank": 2, "alpha": 3}})
    layer = model.sites[0].module.to_k
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        wanted = layer(x)
        with fused_lora.adapters_folded(model):
            torch.testing.assert_close(x @ layer.folded.T, wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
            layer.enable_adapters(False)
            assert torch.equal(layer(x), layer.base_layer(x))
            layer.enable_adapters(True)
        assert layer.folded is None and torch.equal(layer(x), wanted)
        monkeypatch.setattr(fused_lora, "WORTH_FOLDING", 1000)
        with fused_lora.adapters_folded(model):
            assert layer.folded is None  # in a large model


def test_half_precision_is_not_folded(tiny: Any) -> None:
    """A small B A would be lost in W0's rounding."""
    model = edited(tiny, {"lora": {"rank": 2}})
    layer = model.sites[0].module.to_k
    assert layer.whole() is not None
    layer.base_layer.bfloat16()
    assert layer.whole() is None


@pytest.mark.parametrize(
    "tree", [{"tlora": {"rank": 4}}, {"lora": {"rank": 2}, "coda_prompt": {}}], ids=str
)
def test_what_depends_on_the_step_is_calculated_at_every_step(
    tree: dict[str, Any], tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = edited(tiny, tree)
    wanted, calls = unsettled(model, monkeypatch), counted(model)
    torch.testing.assert_close(sampled(model), wanted, rtol=0, atol=1e-3)
    assert set(calls.values()) == {SETTINGS.steps}


def test_another_text_a_change_in_place_and_a_watched_layer_are_not_kept(tiny: Any) -> None:
    from trainer.attention.kept_text import KeptText, keeps, same_every_step

    text, kept = torch.randn(1, 4, 8), KeptText()
    kept.of(text)["site"] = text, text
    assert "site" in kept.of(text)
    text += 1
    assert kept.of(text) == {}
    kept.of(text)["site"] = text, text
    assert kept.of(text.clone()) == {}
    assert not keeps(text, text)  # gradients are on
    with torch.no_grad():
        assert keeps(text, text) and not keeps(text.clone(), text) and not keeps(None, None)
    layer = tiny.sites[0].module.to_k
    assert same_every_step(layer)
    layer.register_forward_hook(lambda *_: None)
    assert not same_every_step(layer)
