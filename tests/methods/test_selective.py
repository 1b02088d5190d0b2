"""Selective training: exactly the chosen projections; no gradient by the first token's K and V."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.sites import select
from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.methods.apply import apply_methods
from trainer.methods.weight.selective import Selective

ROLES = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
CASES = [
    pytest.param("cross", ("k", "v"), id="cross-kv"),
    pytest.param("cross", ("q",), id="cross-q"),
    pytest.param("self & up", ("q", "out"), id="self-up-q-out"),
    pytest.param("all", ("q", "k", "v", "out"), id="all"),
    pytest.param("name:mid_block*attn2 | down & cross", ("v",), id="name-or-down"),
]
PROMPTS = ["a <v1> on a red background", "a fox"]


def expected(tiny: Any, selector: str, projections: tuple[str, ...]) -> set[str]:
    """By the parameters' own names, without asking a site for its projections."""
    prefixes = [
        f"unet.{site.name}.{ROLES[role]}."
        for site in select(tiny.sites, selector)
        for role in projections
    ]
    return {name for name, _ in tiny.named_parameters() if name.startswith(tuple(prefixes))}


@pytest.mark.parametrize(("selector", "projections"), CASES)
def test_trains_exactly_the_chosen(selector: str, projections: tuple[str, ...], tiny: Any) -> None:
    plan = apply_methods(tiny, {"selective": Selective(sites=selector, projections=projections)})
    assert set(plan.names) == expected(tiny, selector, projections)
    assert {name for name, p in tiny.named_parameters() if p.requires_grad} == set(plan.names)
    assert plan.edits["selective"].sites == tuple(s.name for s in select(tiny.sites, selector))


def test_custom_diffusion_trains_k_and_v_of_every_attn2(tiny: Any) -> None:
    plan = apply_methods(tiny, {"selective": Selective()})
    wanted = {
        name
        for name, _ in tiny.named_parameters()
        if ".attn2.to_k." in name or ".attn2.to_v." in name
    }
    assert set(plan.names) == wanted
    assert plan.trained == sum(2 * 128 * width for width in (16, 32, 32, 32, 32, 16, 16))


@pytest.mark.parametrize(
    "selector",
    [pytest.param("cross & self", id="both-kinds"), pytest.param("name:nothing*", id="name")],
)
def test_no_match_names_the_key_and_the_selector(selector: str, tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"methods\.selective: sites: the selector") as error:
        apply_methods(tiny, {"selective": Selective(sites=selector)})
    assert repr(selector) in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"sites": "crss"}, "did you mean 'cross'", id="misspelt-selector"),
        pytest.param({"projections": ["k", "x"]}, "methods.selective.projections.1", id="role"),
        pytest.param({"projections": []}, "methods.selective.projections", id="no-role"),
        pytest.param({"site": "cross"}, "did you mean methods.selective.sites", id="key"),
    ],
)
def test_wrong_options_are_refused_by_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        methods_of({"selective": options})
    assert message in str(error.value)


def test_the_texts_own_layers_are_called_k_and_v_in_cross_attention(tiny: Any) -> None:
    said = r"is cross-attention, .* called k and v; give projections=\[k,v\]$"
    with pytest.raises(ValueError, match=said):
        apply_methods(tiny, methods_of({"selective": {"projections": ["add_k", "add_v"]}}))


def test_detaching_needs_a_cross_site(tiny: Any) -> None:
    method = Selective(sites="self", detach_first_token=True)
    with pytest.raises(ValueError, match=r"detach_first_token needs cross-attention"):
        apply_methods(tiny, {"selective": method})


def test_detaching_leaves_self_attention_alone(tiny: Any) -> None:
    apply_methods(tiny, {"selective": Selective(sites="all", detach_first_token=True)})
    kinds = {p.site.kind for p in tiny.host.processors.values() if p.ops}
    assert kinds == {"cross"}


def naive(attn: Any, x: Tensor, text: Tensor, detach: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v head by head, the first token's k and v taken out of the graph."""
    q, k, v = attn.to_q(x), attn.to_k(text), attn.to_v(text)
    if detach:
        k = torch.stack([k[:, 0].detach(), *k.unbind(1)[1:]], dim=1)
        v = torch.stack([v[:, 0].detach(), *v.unbind(1)[1:]], dim=1)
    width = q.shape[-1] // attn.heads
    heads = []
    for start in range(0, q.shape[-1], width):
        part = slice(start, start + width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
        heads.append(scores.softmax(-1) @ v[..., part])
    return attn.to_out[0](torch.cat(heads, -1))


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), inputs))


def test_detached_gradient_is_the_naive_one(tiny: Any) -> None:
    apply_methods(tiny, {"selective": Selective(detach_first_token=True)})
    site = select(tiny.sites, "cross")[1]
    attn: Any = site.module
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 7, attn.to_q.in_features, generator=generator)
    text = torch.randn(3, 5, attn.to_k.in_features, generator=generator).requires_grad_()
    inputs = [attn.to_k.weight, attn.to_v.weight, text]
    own = gradients(attn(x, encoder_hidden_states=text), inputs)
    wanted = gradients(naive(attn, x, text, detach=True), inputs)
    whole = gradients(naive(attn, x, text, detach=False), inputs)
    for found, reference, full in zip(own, wanted, whole, strict=True):
        torch.testing.assert_close(found, reference)
        assert not torch.allclose(found, full, rtol=1e-2)
    assert own[2][:, 0].abs().max() == 0


def test_detaching_changes_no_output(tiny: Any) -> None:
    x_t = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([3, 900])
    with torch.no_grad():
        condition = tiny.encode_prompts(PROMPTS)
        base = tiny.predict(x_t, t, condition)
        apply_methods(tiny, {"selective": Selective(detach_first_token=True)})
        assert torch.equal(tiny.predict(x_t, t, condition), base)
