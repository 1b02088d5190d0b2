"""peft's other adapters: each starts at the base model, is stored whole, folds; what cannot be is
refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.methods.apply import apply_methods
from trainer.methods.weight.peft_adapter import INSTEAD, OVER_4_BITS, TYPES
from trainer.ops.adapters import nf4
from trainer.ops.adapters.inject import fold
from trainer.runs.adapter import load_adapted

# small enough for the tiny network
OPTIONS: dict[str, dict[str, Any]] = {
    "loha": {"r": 2},
    "lokr": {"r": 2},
    "oft": {"oft_block_size": 8},
    "hra": {"r": 2},
    "ia3": {},
    "fourierft": {"n_frequency": 20},
    "waveft": {"n_frequency": 20},
    "c3a": {"block_size": 8},
    "miss": {"r": 4},
    "hira": {"r": 2},
    "delora": {"r": 2},
    "gralora": {"r": 4, "gralora_k": 2},
    "road": {"group_size": 8},
}
each_type = pytest.mark.parametrize("kind", TYPES)


def tree(kind: str, **more: Any) -> dict[str, Any]:
    return {"peft_adapter": {"type": kind, "sites": "self", "options": OPTIONS[kind], **more}}


def test_every_type_has_options_here() -> None:
    assert set(OPTIONS) == set(TYPES)
    assert set(OVER_4_BITS) <= set(TYPES)
    assert not set(INSTEAD) & set(TYPES)


@pytest.mark.sampled(5)
@each_type
def test_starts_at_the_base_model_and_trains(
    kind: str, tiny: Any, train: Callable[..., list[float]], predict: Callable[[Any], Tensor]
) -> None:
    weights = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    base = predict(tiny)
    plan = apply_methods(tiny, methods_of(tree(kind)))
    if kind == "hra":  # two reflections each undo the other, but for rounding
        torch.testing.assert_close(predict(tiny), base, rtol=0, atol=1e-5)
    else:
        assert torch.equal(predict(tiny), base)
    before = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    train(tiny, plan)
    after = dict(tiny.named_parameters())
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == set(plan.names)
    for name, parameter in after.items():
        plain = name.replace(".base_layer.", ".")
        assert plain not in weights or torch.equal(parameter, weights[plain]), name


@pytest.mark.sampled(5)
@each_type
def test_what_is_stored_is_all_there_is(
    kind: str,
    tiny: Any,
    tiny_folder: Path,
    tmp_path: Path,
    predict: Callable[[Any], Tensor],
    randomise: Callable[..., None],
    save: Callable[..., dict[str, Tensor]],
) -> None:
    """Made under one seed, loaded under another: nothing drawn at random is left out."""
    plan = apply_methods(tiny, methods_of(tree(kind)), seed=5)
    randomise(tiny, plan)
    live = predict(tiny)
    path = tmp_path / "adapter.safetensors"
    save(path, tiny, plan, {"backbone": str(tiny_folder), "methods": tree(kind)})
    loaded, _ = load_adapted(path)
    assert torch.equal(predict(loaded), live)


@pytest.mark.sampled(5)
@each_type
def test_folded_into_weights_it_does_the_same(
    kind: str, tiny: Any, predict: Callable[[Any], Tensor], randomise: Callable[..., None]
) -> None:
    base = predict(tiny)
    randomise(tiny, apply_methods(tiny, methods_of(tree(kind))))
    live = predict(tiny)
    assert not torch.allclose(live, base, atol=1e-4)
    fold(tiny)
    assert all(type(site.projection("q")) is nn.Linear for site in tiny.sites)
    torch.testing.assert_close(predict(tiny), live, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", OVER_4_BITS)
def test_over_4_bits_it_does_what_it_does_over_the_same_values(
    kind: str,
    tiny: Any,
    open_folder: Callable[[Path], Any],
    tiny_folder: Path,
    predict: Callable[[Any], Tensor],
    randomise: Callable[..., None],
) -> None:
    packing = {"nf4": {"min_size": 256}}
    plan = apply_methods(tiny, methods_of(packing | tree(kind)))
    plain = open_folder(tiny_folder)
    apply_methods(plain, methods_of(packing | {"new_token": {}}))
    fold(plain)
    apply_methods(plain, methods_of(tree(kind)))
    randomise(tiny, plan)
    randomise(plain, plan)
    torch.testing.assert_close(predict(tiny), predict(plain), rtol=1e-4, atol=1e-5)
    assert any(nf4.is_packed(layer) for layer in tiny.modules())
    live = predict(tiny)
    fold(tiny)
    torch.testing.assert_close(predict(tiny), live, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(set(TYPES) - set(OVER_4_BITS)))
def test_others_are_refused_over_4_bits(kind: str, tiny: Any) -> None:
    with pytest.raises(ValueError, match=f"{kind} calculates with W0, and methods.nf4 stores that"):
        apply_methods(tiny, methods_of({"nf4": {"min_size": 256}} | tree(kind)))


def test_the_text_encoder_and_convolutions(
    tiny: Any, predict: Callable[[Any], Tensor], randomise: Callable[..., None]
) -> None:
    options = {"sites": None, "layers": ["conv_in"], "text_encoder": ["v"]}
    plan = apply_methods(tiny, methods_of(tree("loha", **options)))
    randomise(tiny, plan)
    owners = {name.partition(".hada")[0] for name in plan.names}
    assert "unet.conv_in" in owners
    assert sum(name.startswith("text_encoder") for name in owners) == len(owners) - 1
    live = predict(tiny)
    fold(tiny)
    torch.testing.assert_close(predict(tiny), live, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2}, "options.rank: no such option"),
        ({"alpah": 2}, "options.alpah: no such option; did you mean alpha?"),
        ({"r": "many"}, "options.r='many': Input should be a valid integer"),
        ({"r": 0}, "peft cannot adapt these layers so: `r` should be a positive integer"),
        ({"target_modules": ["to_q"]}, "options.target_modules: layers are chosen by sites"),
        ({"rank_pattern": {"to_q": 3}}, "options.rank_pattern: layers are chosen by sites"),
        ({"peft_type": "LORA"}, "options.peft_type: no such option"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str, tiny: Any) -> None:
    with pytest.raises(ValueError) as error:
        apply_methods(tiny, methods_of({"peft_adapter": {"type": "loha", "options": options}}))
    assert str(error.value).startswith("methods.peft_adapter: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("fourierft", {"n_frequency": 10**6}), ("c3a", {"block_size": 7}), ("miss", {"r": 1000})],
    ids=["frequencies", "block", "rank"],
)
def test_sizes_that_do_not_fit_are_refused(kind: str, options: dict[str, Any], tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"^methods\.peft_adapter: peft cannot adapt these layers"):
        apply_methods(tiny, methods_of({"peft_adapter": {"type": kind, "options": options}}))


@pytest.mark.parametrize(
    ("kind", "options"), [("fourierft", {"n_frequency": 20}), ("c3a", {"block_size": 16})]
)
def test_a_start_of_the_users_own_is_taken(
    kind: str, options: dict[str, Any], tiny: Any, predict: Callable[[Any], Tensor]
) -> None:
    base = predict(tiny)
    given = {"type": kind, "sites": "self & mid", "options": options | {"init_weights": False}}
    apply_methods(tiny, methods_of({"peft_adapter": given}))
    assert not torch.allclose(predict(tiny), base, atol=1e-4)


def test_an_option_of_null_is_none(tiny: Any) -> None:
    plan = apply_methods(tiny, methods_of(tree("loha", options={"r": None})))
    assert {p.shape[1] for n, p in tiny.named_parameters() if n.endswith("_a.peft_adapter")} == {8}
    assert plan.names


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("vera", "vera shares tensors between layers, which peft cannot inject"),
        ("boft", "boft is the same as oft unless peft can compile its CUDA code; use oft"),
        ("bone", "bone is called miss"),
        ("lora", "lora is a method of its own; use methods.lora"),
        ("loah", "no such adapter; did you mean loha?"),
        ("xyz", "no such adapter; there are: loha, lokr"),
    ],
)
def test_refused_types(kind: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        methods_of({"peft_adapter": {"type": kind}})
    assert message in str(error.value)


def test_what_is_said_of_shared_state_is_so() -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    shared = {
        kind.value.lower()
        for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if getattr(tuner, "uses_shared_state", False)
    }
    assert shared == {name for name, why in INSTEAD.items() if "shares tensors" in why}
