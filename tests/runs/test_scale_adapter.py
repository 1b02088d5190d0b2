"""`scale=`: the base at 0 and the adapter at 1, to the last bit; linear between, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import find_method, method_names
from trainer.runs.adapter import load_adapted
from trainer.runs.scale_adapter import owner_of

Save = Callable[..., Path]
LINEAR: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"sites": "all", "rank": 3, "alpha": 5, "text_encoder": ["q", "fc1"]}},
    "pissa": {"lora": {"sites": "cross", "rank": 2, "init": "pissa"}},
    "c_lora": {"c_lora": {"rank": 2, "task": 1}},
    "inflora": {"inflora": {"rank": 2, "task": 1}},
    "loha": {"peft_adapter": {"type": "loha", "sites": "cross"}},
    "lokr": {"peft_adapter": {"type": "lokr", "sites": "cross"}},
    "selective": {"selective": {"sites": "cross", "detach_first_token": True}},
    "full": {"full": {"text_encoder": True}},
    "words": {"word_embedding": {"tokens": ["fox", "red"]}},
    "custom": {"selective": {}, "new_token": {"tokens": ["<v1>"]}},
    "domain": {"domain_adapter": {"rank": 3}},
    "both": {"lora": {"sites": "self"}, "selective": {"sites": "cross"}},
}
REFUSED: dict[str, dict[str, Any]] = {
    "dora": {"dora": {"sites": "cross"}},
    "controls": {"controls": {"sites": "cross"}},
    "longlora": {"longlora": {"rank": 2}},
    "oft": {"peft_adapter": {"type": "oft", "sites": "cross"}},
    "hira": {"peft_adapter": {"type": "hira", "sites": "cross"}},
}
how = Sampling(steps=2, guidance=3.0)


def picture(model: Any, prompt: str = "a fox on a red background") -> Tensor:
    return sample(model, [prompt], [3], settings=how)


def weights(model: Any) -> dict[str, Tensor]:
    """Every layer's effective weight and bias, in float64: adapters folded into their layers."""
    found = {}
    for name, layer in model.named_modules():
        if ".base_layer" in name or "lora_" in name or "hada_" in name or "lokr_" in name:
            continue
        base = getattr(layer, "base_layer", None)
        for leaf, value in (layer if base is None else base).named_parameters(recurse=False):
            found[f"{name}.{leaf}"] = value.detach().double()
        if base is not None and not layer.disable_adapters:
            for adapter in layer.active_adapters:
                found[f"{name}.weight"] = (
                    found[f"{name}.weight"] + layer.get_delta_weight(adapter).double()
                )
    return found


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", LINEAR)
def test_0_is_the_base_and_1_the_adapter_to_the_last_bit(
    kind: str, tiny: Any, tiny_folder: Path, save_trained_on: Save
) -> None:
    path = save_trained_on(tiny_folder, LINEAR[kind])
    base, adapted = picture(tiny), picture(load_adapted(path)[0])
    none, whole, half = (picture(load_adapted(path, scale=s)[0]) for s in (0.0, 1.0, 0.5))
    assert torch.equal(none, base)
    assert torch.equal(whole, adapted)
    if kind != "custom" or not torch.equal(adapted, base):
        assert not torch.equal(adapted, base)
        assert not torch.equal(half, base) and not torch.equal(half, adapted)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("scale", [0.3, 1.7, -1.0])
@pytest.mark.parametrize("kind", LINEAR)
def test_every_weight_moves_in_proportion(
    kind: str, scale: float, tiny: Any, tiny_folder: Path, save_trained_on: Save
) -> None:
    path = save_trained_on(tiny_folder, LINEAR[kind])
    base, whole = weights(load_adapted(path, scale=0.0)[0]), weights(load_adapted(path)[0])
    some, stock = weights(load_adapted(path, scale=scale)[0]), weights(tiny)
    moved = 0
    for name, value in some.items():
        if "embedding.rows" in name or "token_embedding" in name:
            continue
        wanted = base[name] + scale * (whole[name] - base[name])
        torch.testing.assert_close(value, wanted, rtol=0, atol=2e-6)
        assert torch.equal(base[name], stock[name])
        moved += int(not torch.equal(whole[name], base[name]))
    assert moved or kind == "words"


@pytest.mark.parametrize("scale", [0.0, 0.25])
@pytest.mark.parametrize("chosen", ["lora", "selective"])
def test_one_method_is_scaled_and_the_other_stays(
    chosen: str, scale: float, tiny_folder: Path, save_trained_on: Save
) -> None:
    path = save_trained_on(tiny_folder, LINEAR["both"])
    base, whole = weights(load_adapted(path, scale=0.0)[0]), weights(load_adapted(path)[0])
    some = weights(load_adapted(path, scale={chosen: scale})[0])
    kind = {"lora": ".attn1.", "selective": ".attn2."}[chosen]
    for name, value in some.items():
        wanted = whole[name]
        if kind in name:
            wanted = base[name] + scale * (whole[name] - base[name])
        torch.testing.assert_close(value, wanted, rtol=0, atol=2e-6)
    assert any(not torch.equal(whole[name], base[name]) for name in some if kind in name)


def test_what_is_no_dw_stays_where_another_method_is_scaled(
    tiny_folder: Path, save_trained_on: Save
) -> None:
    tree = {"dora": {"sites": "cross"}, "lora": {"sites": "self"}}
    path = save_trained_on(tiny_folder, tree)
    load_adapted(path, scale={"lora": 0.5})
    with pytest.raises(ValueError, match=r"scale: adapter=\S+ has methods\.dora"):
        load_adapted(path, scale={"dora": 0.5})
    with pytest.raises(ValueError, match=r"scale\.loar: adapter=\S+ has no methods\.loar; it has"):
        load_adapted(path, scale={"loar": 0.5})


def test_a_known_word_moves_and_a_new_one_stays(tiny_folder: Path, save_trained_on: Save) -> None:
    methods = {"word_embedding": {"tokens": ["fox"]}, "new_token": {"tokens": ["<v1>"]}}
    path = save_trained_on(tiny_folder, methods)
    tables = {}
    for scale in (0.0, 0.25, 1.0):
        model, _ = load_adapted(path, scale=scale)
        tables[scale] = model.text_encoder.get_input_embeddings().weight.detach()
    fox = load_adapted(path)[0].tokenizer.convert_tokens_to_ids("fox</w>")
    moved = tables[0.0][fox] + 0.25 * (tables[1.0][fox] - tables[0.0][fox])
    torch.testing.assert_close(tables[0.25][fox], moved)
    assert not torch.equal(tables[0.0][fox], tables[1.0][fox])
    assert all(torch.equal(table[-1], tables[1.0][-1]) for table in tables.values())
    stored = [
        value for name, value in load_file(path).items() if torch.equal(value, tables[0.0][-1])
    ]
    assert len(stored) == 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_dw_is_refused_by_name(
    kind: str, tiny_folder: Path, save_trained_on: Save
) -> None:
    path = save_trained_on(tiny_folder, REFUSED[kind])
    (name,) = REFUSED[kind]
    for scale in (0.0, 0.5):
        with pytest.raises(ValueError, match=rf"scale: adapter={path} has methods\.{name}"):
            load_adapted(path, scale=scale)
    load_adapted(path, scale=1.0)


def test_which_methods_are_linear() -> None:
    """A list to be thought about when a method is added."""
    made = {"word_embedding": {"tokens": ["a"]}, "peft_adapter": {"type": "loha"}}
    linear = []
    for name in method_names():
        try:
            method = find_method(name)(**made.get(name, {}))
        except ValueError:
            continue
        linear += [name] if method.linear else []
    assert linear == [
        "c_lora", "domain_adapter", "full", "inflora", "lora", "new_token", "nf4", "peft_adapter",
        "selective", "word_embedding",
    ]  # fmt: skip


def test_the_owner_of_a_tensor() -> None:
    layers = {"unet.a.to_k": object()}
    assert owner_of("unet.a.to_k.lora_B.lora-1.weight", layers) == ("unet.a.to_k", "lora-1")
    assert owner_of("unet.a.to_k.lokr_w1.peft_adapter", layers) == ("unet.a.to_k", "peft_adapter")
    assert owner_of("unet.a.to_k.inflora_kept", layers) == ("unet.a.to_k", None)
    assert owner_of("unet.a.to_k.base_layer.weight", layers)[1] is None
    assert owner_of("unet.a.to_v.weight", layers)[1] is None
