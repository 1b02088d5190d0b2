"""The quicker LoRA and DoRA layers beside peft's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from trainer.backbones.four_bits import pack
from trainer.ops.adapters.fused_lora import LowRankLinear, quicken
from trainer.ops.adapters.packed_lora import _is_plain

ROWS = {"tall": (3, 9), "short": (2,), "one": (1,), "four axes": (2, 3, 5)}
SIZES = {"small": (10, 6), "large": (24, 20)}  # below and above 4 r (c + d) elements


def adapted(
    bias: bool = True, size: tuple[int, int] = SIZES["small"], **options: Any
) -> tuple[Any, Any]:
    """peft's layer with an adapter of rank 2 that does something; ours with the same tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*size, bias=bias)).requires_grad_(False)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], **options)
    inject_adapter_in_model(config, model, adapter_name="own")
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn_like(value))
    theirs, ours = model[0], copy.deepcopy(model[0])
    quicken(ours)
    assert type(theirs) is Linear and type(ours) is LowRankLinear
    return theirs, ours


def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, then the gradients on the input and on what trains."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    trained = [p.grad for p in layer.parameters() if p.requires_grad]
    found = [y.detach(), x.grad, *trained]
    assert all(value is not None for value in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dora", [False, True])
def test_equals_peft(dora: bool, bias: bool, rows: tuple[int, ...], size: tuple[int, int]) -> None:
    theirs, ours = adapted(bias, size, use_dora=dora)
    x = torch.randn(*rows, size[0])
    for own, other in zip(results(ours, x), results(theirs, x), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rows", [(3, 9), (2,)])
def test_lora_gradients_are_those_of_its_output(
    rows: tuple[int, ...], size: tuple[int, int]
) -> None:
    _, ours = adapted(size=size)
    ours.double()
    trained = [ours.lora_A["own"].weight, ours.lora_B["own"].weight]

    def run(x: Tensor, *_: Tensor) -> Tensor:
        found: Tensor = ours(x)
        return found

    x = torch.randn(*rows, size[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *trained))


def test_a_strided_input_needs_no_copy_of_the_caller() -> None:
    theirs, ours = adapted()
    x = torch.randn(4, 10, 5).transpose(1, 2)
    for own, other in zip(results(ours, x), results(theirs, x), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def test_what_is_not_plain_is_left_to_peft() -> None:
    """Two adapters, dropout in training, DoRA under autocast, a folded one, one switched off."""
    theirs, ours = adapted(lora_dropout=0.5)
    x = torch.randn(4, 10)
    torch.manual_seed(1)
    expected = theirs.train()(x)
    torch.manual_seed(1)
    assert torch.equal(ours.train()(x), expected)
    theirs.eval(), ours.eval()
    torch.testing.assert_close(ours(x), theirs(x))
    plain = ours.base_layer(x)
    ours.enable_adapters(False)
    assert torch.equal(ours(x), plain)
    ours.enable_adapters(True)
    for layer in (theirs, ours):
        torch.manual_seed(2)
        layer.update_layer("second", 2, 2, LoraConfig(r=2, init_lora_weights=False))
        layer.set_adapter(["own", "second"])
    assert torch.equal(ours(x), theirs(x))
    ours.merge()
    torch.testing.assert_close(ours(x), theirs(x))


def test_dora_under_autocast_is_left_to_peft() -> None:
    theirs, ours = adapted(use_dora=True)
    x = torch.randn(4, 10)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("incoming", [torch.float32, torch.bfloat16])
def test_under_autocast_it_is_as_near_to_the_equation_as_peft(
    incoming: torch.dtype, bias: bool, rows: tuple[int, ...], size: tuple[int, int]
) -> None:
    theirs, ours = adapted(bias, size)
    x = torch.randn(*rows, size[0]).to(incoming)
    exact = results(copy.deepcopy(theirs).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        found, peft = results(ours, x), results(theirs, x)
    assert [value.dtype for value in found] == [value.dtype for value in peft]
    for own, other, wanted in zip(found, peft, exact, strict=True):
        error, allowed = (own - wanted).norm(), (other - wanted).norm()
        assert error <= 1.5 * allowed + 2**-8 * wanted.norm()


def test_half_precision_does_not_lose_a_small_update() -> None:
    """W0 x is 0, and B A is below the precision of bfloat16 beside W0."""
    _, ours = adapted(bias=False)
    x = torch.tensor([1.0, -1.0] * 5).repeat(40, 1)
    with torch.no_grad():
        ours.base_layer.weight.fill_(1.0)
        ours.lora_A["own"].weight.zero_()
        ours.lora_A["own"].weight[:, 0] = 1.0
        ours.lora_B["own"].weight.fill_(2.0**-12)
    wanted = torch.full((40, 6), 2 * 2.0**-12 * 1.5)  # two ranks, and alpha 3 over rank 2
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x).float(), wanted)


def test_a_convolution_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), model, adapter_name="own")
    kind = type(model[0])
    quicken(model[0])
    assert type(model[0]) is kind


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(3, 40), (2, 5)], ids=["tall", "short"])
@pytest.mark.parametrize("rank", [2, 16], ids=["thin", "small"])
def test_over_four_bits_it_equals_peft(bias: bool, rows: tuple[int, ...], rank: int) -> None:
    """Forward and every gradient; short inputs, and those under autocast, are left to peft."""
    torch.manual_seed(0)
    model = nn.Sequential(pack(nn.Linear(64, 96, bias=bias), torch.float32))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft asks for it
    config = LoraConfig(r=rank, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
    inject_adapter_in_model(config, model, adapter_name="own")
    theirs: Any = model[0]
    ours = copy.deepcopy(theirs)
    quicken(ours)
    assert type(ours).__name__ == "LowRankLinear4bit" and type(theirs).__name__ == "Linear4bit"
    x = torch.randn(*rows, 64)
    assert _is_plain(ours, x) == (rows == (3, 40))
    for own, other in zip(results(ours, x), results(theirs, x), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert not _is_plain(ours, x) and torch.equal(ours(x), theirs(x))
    assert not _is_plain(ours, x.double())
    ours.train().lora_dropout["own"] = nn.Dropout(0.5)
    assert not _is_plain(ours, x) and _is_plain(ours.eval(), x) == (rows == (3, 40))
