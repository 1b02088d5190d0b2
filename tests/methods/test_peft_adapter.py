"""peft's other adapters: each starts at the base model, is stored whole, folds; what cannot be is
refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.deft.layer import DeftLinear
from torch import Tensor, nn

from trainer.backbones import four_bits
from trainer.backbones.device import Placement, place
from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.methods.apply import apply_methods, method_names
from trainer.methods.weight.peft_adapter import INSTEAD, KEPT, OVER_4_BITS, TYPES
from trainer.ops.adapters.inject import fold
from trainer.ops.adapters.peft_adapter import ExactDeft
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
    "glora": {"r": 2},
    "deft": {"r": 2},
    "psoft": {"r": 4},
    "peanut": {"r": 4, "depth": 1},
    "beft": {},
    "supertuning": {"sparsity": 0.9, "r": 2},
}
each_type = pytest.mark.parametrize("kind", TYPES)


def tree(kind: str, **more: Any) -> dict[str, Any]:
    # in the U-Net only the output projections of attention have a bias
    own = {"projections": ["out"]} if kind == "beft" else {}
    options = {"type": kind, "sites": "self", "options": OPTIONS[kind]}
    return {"peft_adapter": options | own | more}


def test_every_type_has_options_here() -> None:
    assert set(OPTIONS) == set(TYPES)
    assert set(OVER_4_BITS) <= set(TYPES)
    assert set(KEPT) <= set(TYPES)
    assert not set(INSTEAD) & set(TYPES)


def test_every_kind_of_peft_is_supported_or_refused_with_a_reason() -> None:
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for kind in PeftType:
        name = kind.value.lower()
        if name in TYPES:
            cls = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
            assert TYPES[name][0] == cls.__name__
            continue
        with pytest.raises(RecipeError) as error:
            methods_of({"peft_adapter": {"type": name}})
        assert f"{name} {INSTEAD[name]}" in str(error.value)
    variants = {"dora", "bone"}
    assert {*TYPES, *INSTEAD} - variants == {kind.value.lower() for kind in PeftType}


def test_what_refusals_propose_is_there() -> None:
    """Each names a type or a method that is there."""
    for name, why in INSTEAD.items():
        proposed = set(re.findall(r"methods\.(\w+)", why))
        assert proposed <= set(method_names()), name
        assert proposed or any(re.search(rf"\b{kind}\b", why) for kind in TYPES) or "sample" in why


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
    """Made under one seed, loaded under another: nothing drawn at random is left out. Without
    gradients, because torch multiplies what has one in another order. The last bit of glora's W0 C
    depends on where W0 lies in memory."""
    plan = apply_methods(tiny, methods_of(tree(kind)), seed=5)
    randomise(tiny, plan)
    path = tmp_path / "adapter.safetensors"
    save(path, tiny, plan, {"backbone": str(tiny_folder), "methods": tree(kind)})
    loaded, _ = load_adapted(path)
    with torch.no_grad():
        live, again = predict(tiny), predict(loaded)
    if kind == "glora":
        torch.testing.assert_close(again, live, rtol=0, atol=1e-5)
    else:
        assert torch.equal(again, live)


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
    assert all(type(site.projection("out")) is nn.Linear for site in tiny.sites)
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
    assert any(four_bits.is_packed(layer) for layer in tiny.modules())
    live = predict(tiny)
    fold(tiny)
    torch.testing.assert_close(predict(tiny), live, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(set(TYPES) - set(OVER_4_BITS)))
def test_others_are_refused_over_4_bits(kind: str, tiny: Any) -> None:
    chosen = tree(kind, sites="cross", projections=["k"])  # whose rows are whole blocks
    with pytest.raises(ValueError, match=f"{kind} calculates with W0, and methods.nf4 stores that"):
        apply_methods(tiny, methods_of({"nf4": {"min_size": 256}} | chosen))


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
        ("lily", "lily mixes its matrices by the mean over all rows of a batch"),
        ("prefix_tuning", "use methods.coda_prompt"),
        ("loah", "no such adapter; did you mean loha?"),
        ("xyz", "no such adapter; there are: loha, lokr"),
    ],
)
def test_refused_types(kind: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        methods_of({"peft_adapter": {"type": kind}})
    assert message in str(error.value)


def test_a_vector_where_there_is_no_bias_is_no_weight(
    tiny: Any, predict: Callable[[Any], Tensor], randomise: Callable[..., None]
) -> None:
    base = predict(tiny)
    plan = apply_methods(tiny, methods_of(tree("beft", projections=["v"])))
    assert torch.equal(predict(tiny), base)
    randomise(tiny, plan)
    assert not torch.allclose(predict(tiny), base, atol=1e-4)
    with pytest.raises(ValueError, match=r"cannot be folded into a weight: .* of type beft adds a"):
        fold(tiny)


@pytest.mark.parametrize(
    "options", [{"r": 3, "alpha": 12}, {"r": 3, "decomposition_method": "qr"}], ids=["alpha", "qr"]
)
def test_deft_adds_nothing_at_the_start_and_what_peft_adds_later(
    options: dict[str, Any],
    tiny: Any,
    predict: Callable[[Any], Tensor],
    randomise: Callable[..., None],
) -> None:
    base = predict(tiny)
    plan = apply_methods(tiny, methods_of(tree("deft", options=options)))
    assert torch.equal(predict(tiny), base)
    randomise(tiny, plan)
    own = predict(tiny)
    own.square().sum().backward()
    names = [name for name in plan.names if ".deft_" in name]
    mine = {name: tiny.get_parameter(name).grad.clone() for name in names}
    tiny.zero_grad()
    for layer in tiny.modules():
        if isinstance(layer, ExactDeft):
            layer.__class__ = DeftLinear
    wanted = predict(tiny)
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)
    wanted.square().sum().backward()
    for name in names:
        torch.testing.assert_close(mine[name], tiny.get_parameter(name).grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["deft", "glora", "peanut", "psoft", "beft", "supertuning"])
def test_over_a_base_in_bf16_it_starts_there_too(
    kind: str, tiny: Any, predict: Callable[[Any], Tensor]
) -> None:
    """As a run has it: its layers are held in bf16 before and after the method is applied."""
    where = Placement(torch.device("cpu"), "bf16")
    assert tiny.host.sites  # attention in half precision is another sum of the same products
    base = predict(place(tiny.requires_grad_(False), where))
    plan = apply_methods(tiny, methods_of(tree(kind)))
    assert torch.equal(predict(place(tiny, where, plan.stored)), base)


@pytest.mark.parametrize("kind", KEPT)
def test_what_another_machine_may_find_otherwise_is_stored(
    kind: str,
    tiny: Any,
    tiny_folder: Path,
    tmp_path: Path,
    predict: Callable[[Any], Tensor],
    randomise: Callable[..., None],
    save: Callable[..., dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if singular vectors had other signs, and equal entries another order."""
    plan = apply_methods(tiny, methods_of(tree(kind)))
    assert all(any(table in name for name in plan.keeps) for table in KEPT[kind])
    randomise(tiny, plan)
    live = predict(tiny)
    path = tmp_path / "adapter.safetensors"
    save(path, tiny, plan, {"backbone": str(tiny_folder), "methods": tree(kind)})
    svd, topk = torch.linalg.svd, torch.topk

    def other_svd(*args: Any, **kwargs: Any) -> Any:
        u, s, v = svd(*args, **kwargs)
        signs = torch.ones_like(s).index_fill_(0, torch.arange(0, len(s), 2), -1)
        return u * signs, s, signs[:, None] * v

    def other_topk(*args: Any, **kwargs: Any) -> Any:
        values, indices = topk(*args, **kwargs)
        return values.flip(0), indices.flip(0)

    monkeypatch.setattr(torch.linalg, "svd", other_svd)
    monkeypatch.setattr(torch, "topk", other_topk)
    loaded, _ = load_adapted(path)
    assert torch.equal(predict(loaded), live)


def test_what_is_said_of_shared_state_is_so() -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    shared = {
        kind.value.lower()
        for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if getattr(tuner, "uses_shared_state", False)
    }
    assert shared == {name for name, why in INSTEAD.items() if "shares tensors" in why}
