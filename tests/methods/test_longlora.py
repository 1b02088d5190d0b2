"""LongLoRA: shifted groups against a plain loop, what crosses from group to group and what not,
full attention at test."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.kernels.softmax import sdpa
from trainer.methods.apply import apply_methods
from trainer.methods.weight.longlora import Longlora
from trainer.ops.longlora import ShiftedSparse, shifted_sparse


def qkv(heads: int, tokens: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, heads, tokens, 5)
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]


def numbers(tokens: int, group: int, shifted: bool) -> list[int]:
    """Which group each token is in, counted one by one."""
    found, number, filled = [], 0, 0
    size = group // 2 if shifted and group > 1 else group
    for _ in range(tokens):
        if filled == size:
            number, filled, size = number + 1, 0, group
        found.append(number)
        filled += 1
    return found


def naive(q: Tensor, k: Tensor, v: Tensor, group: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, head by head and query by query, over the query's own group."""
    batch, heads, tokens, width = q.shape
    rows = []
    for b in range(batch):
        for h in range(heads):
            own = numbers(tokens, group, shifted=h >= heads - heads // 2)
            own = [0] * tokens if group >= tokens else own
            for i in range(tokens):
                scores = k[b, h] @ q[b, h, i] / math.sqrt(width)
                if mask is not None:
                    seen = mask.expand(batch, heads, tokens, tokens)[b, h, i]
                    hides = seen.dtype == torch.bool
                    scores = scores.masked_fill(~seen, -torch.inf) if hides else scores + seen
                apart = torch.tensor([number != own[i] for number in own])
                rows.append(scores.masked_fill(apart, -torch.inf).softmax(0) @ v[b, h])
    return torch.stack(rows).view(batch, heads, tokens, width)


def compare(own: Tensor, reference: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(own.square().sum(), inputs)
    wanted = torch.autograd.grad(reference.square().sum(), inputs)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 11, 12])
@pytest.mark.parametrize(("heads", "tokens"), [(2, 12), (3, 7), (5, 13)], ids=str)
def test_groups_are_those_of_a_plain_loop(heads: int, tokens: int, group: int) -> None:
    inputs = qkv(heads, tokens)
    compare(shifted_sparse(*inputs, None, None, group), naive(*inputs, group), inputs)


@pytest.mark.parametrize("kind", ["bool", "added", "added-per-head"])
def test_a_mask_of_another_method_holds_inside_the_groups(kind: str) -> None:
    inputs = qkv(3, 9)
    generator = torch.Generator().manual_seed(4)
    mask = torch.randn(2, 3 if "head" in kind else 1, 9, 9, generator=generator)
    if kind == "bool":
        mask = (mask > 0) | torch.eye(9, dtype=torch.bool)
    compare(shifted_sparse(*inputs, mask, None, 4), naive(*inputs, 4, mask), inputs)


@pytest.mark.parametrize("tokens", [7, 16])
def test_one_group_of_all_is_full_attention(tokens: int) -> None:
    inputs = qkv(3, tokens)
    own, full = shifted_sparse(*inputs, None, None, tokens), sdpa(*inputs)
    assert torch.equal(own, full)
    found = torch.autograd.grad(own.square().sum(), inputs)
    wanted = torch.autograd.grad(full.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_nothing_leaks_through_the_wrap_and_halves_meet_their_neighbours() -> None:
    """16 tokens in groups of 4: the shifted heads read [0, 2), [2, 6), ..., [14, 16)."""
    q, k, v = qkv(2, 16)
    output = shifted_sparse(q, k, v, None, None, 4)

    def read_by(head: int, token: int) -> list[int]:
        (grad,) = torch.autograd.grad(output[:, head, token].sum(), v, retain_graph=True)
        return grad.abs().sum((0, 1, 3)).nonzero().flatten().tolist()

    assert read_by(1, 0) == read_by(1, 1) == [0, 1]
    assert read_by(1, 15) == [14, 15]
    assert read_by(1, 3) == [2, 3, 4, 5]
    assert read_by(0, 3) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("group", "tokens", "size"),
    [(0.25, 256, 64), (0.25, 2, 1), (1, 64, 64), (1.0, 7, 7), (16, 256, 16), (0.5, 9, 4)],
)
def test_a_group_is_a_share_or_a_number(group: float, tokens: int, size: int) -> None:
    assert ShiftedSparse(group).size(tokens) == size


def test_groups_in_training_and_full_attention_otherwise(
    tiny: Any, predict: Callable[[Any], Tensor]
) -> None:
    base = predict(tiny).detach()
    apply_methods(tiny, {"longlora": Longlora()})
    assert not torch.allclose(predict(tiny), base, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(predict(tiny), base)
    assert torch.equal(predict(tiny.eval()), base)


def test_one_group_trains_with_full_attention(tiny: Any, predict: Callable[[Any], Tensor]) -> None:
    base = predict(tiny).detach()
    apply_methods(tiny, {"longlora": Longlora(group=1)})
    assert torch.equal(predict(tiny), base)


def test_gradient_checkpointing_groups_both_times(
    tiny: Any, open_folder: Callable[..., Any], tiny_folder: Any, predict: Callable[[Any], Tensor]
) -> None:
    other = open_folder(tiny_folder)
    found = []
    for backbone, checkpointing in ((tiny, False), (other, True)):
        plan = apply_methods(backbone, {"longlora": Longlora()})
        if checkpointing:
            backbone.train()
            backbone.enable_gradient_checkpointing()
        predict(backbone).square().sum().backward()
        parameters = dict(backbone.named_parameters())
        found.append([parameters[name].grad for name in plan.names])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_trains_lora_norms_and_embeddings_and_nothing_else(tiny: Any) -> None:
    own = {name for name, _ in tiny.named_parameters() if name.startswith("unet.")}
    norms = {name for name in own if "norm" in name}
    embeddings = {name for name in own if name.startswith("unet.time_embedding")}
    plan = apply_methods(tiny, {"longlora": Longlora()})
    lora = {name for name in plan.names if ".attn1.to_" in name and ".lora_" in name}
    assert len(lora) == 2 * 4 * sum(site.kind == "self" for site in tiny.sites)
    assert set(plan.names) == lora | norms | embeddings
    kinds = {p.site.kind for p in tiny.host.processors.values() if p.ops}
    assert kinds == {"self"}


def test_sites_all_puts_lora_on_cross_attention_too_but_no_groups(tiny: Any) -> None:
    plan = apply_methods(tiny, {"longlora": Longlora(sites="all", whole=())})
    assert any(".attn2." in name for name in plan.names)
    assert all(".lora_" in name for name in plan.names)
    assert {p.site.kind for p in tiny.host.processors.values() if p.ops} == {"self"}


def test_keys_appended_by_another_op_are_refused(
    tiny: Any, predict: Callable[[Any], Tensor], append_key: Any
) -> None:
    apply_methods(tiny, {"longlora": Longlora()})
    tiny.host.install(append_key, [site for site in tiny.sites if site.kind == "self"])
    with pytest.raises(ValueError, match=r"methods\.longlora groups the tokens of .* appends keys"):
        predict(tiny)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "cross"}, "sites=cross has no self-attention; choose self, or all"),
        ({"sites": "temporal"}, "the selector 'temporal' matches no attention site"),
        ({"rank": 17}, "rank 17 is above the 16 that"),
    ],
)
def test_refused_with_the_mend(options: dict[str, Any], message: str, tiny: Any) -> None:
    with pytest.raises(ValueError) as error:
        apply_methods(tiny, methods_of({"longlora": options}))
    assert str(error.value).startswith("methods.longlora: ")
    assert message in str(error.value)


def test_one_head_is_refused(tiny: Any) -> None:
    sites = tiny.sites
    tiny.host.sites = [dataclasses.replace(site, heads=1) for site in sites]
    with pytest.raises(ValueError, match=r"has one head, and half of the heads are shifted"):
        apply_methods(tiny, {"longlora": Longlora()})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 0}, "methods.longlora.group=0"),
        ({"group": 2.5}, "give a share of at most 1, or a whole number of tokens"),
        ({"whole": ["norm"]}, "did you mean norms?"),
    ],
)
def test_refused_before_loading(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        methods_of({"longlora": options})
    assert message in str(error.value)
