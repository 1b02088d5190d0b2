"""PEFT with Controls: the equation token by token, forward and gradient; folding is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.config.load import methods_of
from trainer.export.formats.merged import merge
from trainer.methods.apply import apply_methods
from trainer.methods.weight.controls import Controls
from trainer.ops.adapters.controls import ControlledLinear, cross_attention_of
from trainer.ops.adapters.inject import fold

UP = "unet.up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
TREE: dict[str, Any] = {"controls": {"sites": "cross", "rank": 3, "alpha": 6.0}}


def naive(y: Tensor) -> Tensor:
    """CPA(y)_j = sum_i softmax_i(<y_j, y_i>) y_i, token by token."""
    rows = []
    for row in y:
        for token in row:
            weights = torch.stack([token @ other for other in row]).softmax(0)
            rows.append(sum(weight * other for weight, other in zip(weights, row, strict=True)))
    return torch.stack(rows).view(y.shape)


@pytest.mark.parametrize("shape", [(2, 7, 5), (3, 1, 4), (1, 13, 8)], ids=str)
def test_cpa_is_the_sum_it_says(shape: tuple[int, ...]) -> None:
    y = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    own, wanted = cross_attention_of(y), naive(y)
    torch.testing.assert_close(own, wanted)
    (found,) = torch.autograd.grad(own.square().sum(), y)
    (reference,) = torch.autograd.grad(wanted.square().sum(), y)
    torch.testing.assert_close(found, reference, rtol=1e-4, atol=1e-5)


def test_rows_without_tokens_are_one_token_each() -> None:
    y = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cross_attention_of(y), y)


def test_a_grid_of_tokens_attends_as_a_sequence() -> None:
    y = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    flat = cross_attention_of(y.flatten(1, 2))
    torch.testing.assert_close(cross_attention_of(y), flat.view(y.shape))


def test_the_equation(tiny: Any, randomise: Callable[..., None]) -> None:
    plan = apply_methods(tiny, methods_of(TREE))
    randomise(tiny, plan, 0.3)
    layer = dict(tiny.named_modules())[UP]
    assert isinstance(layer, ControlledLinear)
    a, b = layer.lora_A["controls"].weight, layer.lora_B["controls"].weight
    x = 0.1 * torch.randn(3, 7, 128, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    y = 2 * x @ a.T @ b.T
    wanted = x @ layer.base_layer.weight.T + y + naive(y)
    own = layer(x)
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(own.square().sum(), [a, b, x])
    reference = torch.autograd.grad(wanted.square().sum(), [a, b, x])
    for mine, other in zip(found, reference, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def test_it_trains_as_many_parameters_as_lora(
    tiny: Any, open_folder: Callable[[Path], Any], tiny_folder: Path
) -> None:
    plan = apply_methods(tiny, methods_of(TREE))
    lora = apply_methods(open_folder(tiny_folder), methods_of({"lora": TREE["controls"]}))
    assert plan.trained == lora.trained
    assert [name.replace(".controls.", ".lora.") for name in plan.names] == list(lora.names)


def test_tokens_hear_of_each_other_but_rows_do_not(
    tiny: Any, randomise: Callable[..., None]
) -> None:
    """LoRA alone is a function of single tokens."""
    plan = apply_methods(tiny, methods_of(TREE))
    randomise(tiny, plan, 0.3)
    layer: Any = dict(tiny.named_modules())[UP]
    x = 0.05 * torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[0, 0].sum(), x)
    assert grad[0].abs().sum(-1).gt(0).all()
    assert not grad[1].any()


def test_without_its_adapter_it_is_the_base_layer(
    tiny: Any, predict: Callable[[Any], Tensor], randomise: Callable[..., None]
) -> None:
    base = predict(tiny).detach()
    plan = apply_methods(tiny, methods_of(TREE))
    randomise(tiny, plan, 0.3)
    assert not torch.allclose(predict(tiny), base, atol=1e-3)
    for layer in tiny.modules():
        if isinstance(layer, ControlledLinear):
            layer.enable_adapters(False)
    assert torch.equal(predict(tiny), base)


def test_a_copy_does_the_same_and_is_its_own(
    tiny: Any, predict: Callable[[Any], Tensor], randomise: Callable[..., None]
) -> None:
    plan = apply_methods(tiny, methods_of(TREE))
    randomise(tiny, plan, 0.3)
    copied = copy.deepcopy(tiny)
    live = predict(tiny).detach()
    assert torch.equal(predict(copied), live)
    randomise(copied, plan, 0.3)
    assert torch.equal(predict(tiny), live)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "over-4-bits"])
def test_folding_is_refused_by_name(packed: bool, tiny: Any) -> None:
    tree = TREE | ({"nf4": {"min_size": 256}} if packed else {})
    apply_methods(tiny, methods_of(tree))
    for refuse in (fold, merge):
        with pytest.raises(ValueError, match=r"cannot be folded into a weight: methods\.controls"):
            refuse(tiny)


def test_export_writes_nothing(
    tiny: Any, tiny_folder: Path, tmp_path: Path, save: Callable[..., dict[str, Tensor]]
) -> None:
    from trainer.export.export import export

    plan = apply_methods(tiny, methods_of(TREE))
    path, out = tmp_path / "adapter.safetensors", tmp_path / "out"
    save(path, tiny, plan, {"backbone": str(tiny_folder), "methods": TREE})
    with pytest.raises(ValueError, match=r"methods\.controls"):
        export(path, out)
    assert list(tmp_path.iterdir()) == [path]


def test_convolutions_are_refused(tiny: Any) -> None:
    method = Controls(sites=None, layers=("conv_in",))
    with pytest.raises(ValueError, match=r"methods\.controls: unet\.conv_in is a convolution"):
        apply_methods(tiny, {"controls": method})
