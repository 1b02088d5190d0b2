"""Operations counted against sums by hand: what trains, what is frozen, what is before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.training.flops import FlopCount, is_compiled, peak_rate

ROWS, WIDE = 3, 5
N = ROWS * WIDE * WIDE  # multiply-adds of a layer


def counted(layers: nn.Sequential, again: Sequence[int] = (), reentrant: bool = False) -> int:
    """again: the layers whose activations are calculated again."""
    count = FlopCount()
    count.begin()
    x = torch.randn(ROWS, WIDE)
    for number, layer in enumerate(layers):
        own = x.requires_grad_(reentrant or x.requires_grad) if number in again else x
        x = checkpoint(layer, own, use_reentrant=reentrant) if number in again else layer(x)
    x.sum().backward()
    return count.end()


def stack(*trains: bool) -> nn.Sequential:
    layers = nn.Sequential(*(nn.Linear(WIDE, WIDE, bias=False) for _ in trains))
    for layer, wanted in zip(layers, trains, strict=True):
        layer.requires_grad_(wanted)
    return layers


@pytest.mark.parametrize(
    ("trains", "wanted"),
    [
        ((True, True, True), 6 * 3 - 2),  # the first one's input needs no gradient
        ((False, True, False), 2 + (2 + 2) + (2 + 2)),  # nothing before it, no weight after it
        ((True, False, False), (2 + 2) + (2 + 2) + (2 + 2)),
        ((False, False, True), 2 + 2 + (2 + 2)),
    ],
)
def test_a_frozen_layer_has_no_gradient_of_its_weight(
    trains: tuple[bool, ...], wanted: int
) -> None:
    assert counted(stack(*trains)) == wanted * N


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_calculated_again_is_no_work_of_the_model(reentrant: bool) -> None:
    layers = stack(True, False, False)
    assert counted(layers, again=(1, 2), reentrant=reentrant) == counted(layers) == 12 * N


@pytest.mark.parametrize("trains", [True, False])
def test_attention_and_convolutions_count(trains: bool) -> None:
    """Scores and their product with the values, 2 n each; five products in the backward, of which
    one calculates the scores again, as fused kernels do."""
    heads, tokens, wide, side = 2, 7, 4, 6
    q, k, v = (torch.randn(1, heads, tokens, wide, requires_grad=trains) for _ in range(3))
    weight = torch.randn(8, 3, 3, 3, requires_grad=trains)
    pixels = torch.randn(1, 3, side, side)
    with FlopCount() as count:
        out = F.scaled_dot_product_attention(q, k, v)
        if trains:
            out.sum().backward()
    products = 7 if trains else 2
    assert count.total == products * 2 * heads * tokens * tokens * wide
    with FlopCount() as count:
        out = F.conv2d(pixels, weight, padding=1)
        if trains:
            out.sum().backward()
    one = 2 * 8 * 3 * 9 * side * side
    assert count.total == (2 if trains else 1) * one


def test_a_compiled_part_is_known() -> None:
    layers = stack(True, True)
    assert not is_compiled(layers)
    layers[1].compile()
    assert is_compiled(layers)


def test_counting_changes_no_value() -> None:
    layers, x = stack(True, False), torch.randn(ROWS, WIDE)
    plain = layers(x)
    with FlopCount():
        assert torch.equal(layers(x), plain)


@pytest.mark.parametrize(
    ("name", "dtype", "rate"),
    [
        ("NVIDIA H100 NVL", torch.bfloat16, 835e12),
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA GeForce GTX 1", torch.bfloat16, None),
    ],
)
def test_the_rate_of_a_device(
    name: str, dtype: torch.dtype, rate: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of dense matrices; a name that is not known has none, and no warning."""

    def named(_: Any) -> str:
        return name

    monkeypatch.setattr(torch.cuda, "get_device_name", named)
    assert peak_rate(torch.device("cuda"), dtype) == rate
    assert peak_rate(torch.device("cpu"), dtype) is None
