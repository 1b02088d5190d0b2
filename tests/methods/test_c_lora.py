"""C-LoRA: earlier concepts' deltas stay, the new one is kept off the weights they changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config.load import methods_of
from trainer.methods.apply import Plan, apply_methods
from trainer.ops.adapters.inject import fold
from trainer.runs.adapter import start_from

PENALTY = 3.0


def apply(backbone: Any, task: int, **more: Any) -> Plan:
    options = {"rank": 2, "alpha": 3, "task": task, "penalty": PENALTY, **more}
    return apply_methods(backbone, methods_of({"c_lora": options}))


def layers(backbone: Any) -> list[Any]:
    sites = [site for site in backbone.sites if site.kind == "cross"]
    return [site.projection(role) for site in sites for role in ("k", "v")]


def fill(layer: Any, task: int) -> tuple[Tensor, Tensor]:
    """Random A and B of a task."""
    down, up = (getattr(layer, name)[f"c_lora-{task}"].weight for name in ("lora_A", "lora_B"))
    generator = torch.Generator().manual_seed(task)
    with torch.no_grad():
        down.normal_(generator=generator)
        up.normal_(generator=generator)
    return down, up


@pytest.mark.parametrize("task", [1, 3])
def test_forward_penalty_and_gradients_against_plain_sums(task: int, tiny: Any) -> None:
    plan = apply(tiny, task)
    pairs = [[fill(layer, each) for each in range(task + 1)] for layer in layers(tiny)]
    loss = plan.edits["c_lora"].loss
    assert loss is not None
    loss(None).backward()
    naive = torch.zeros(())
    own = []
    for tensors in pairs:
        *past, new = [(a.detach().clone(), b.detach().clone()) for a, b in tensors]
        a, b = (tensor.requires_grad_() for tensor in new)
        own.append((a, b))
        rows, columns = b.shape[0], a.shape[1]
        changed = sum(1.5 * b @ a for a, b in past)
        naive = naive + sum(
            (changed[i].abs() * (1.5 * b @ a)[i]).square().sum() for i in range(rows)
        )
        assert changed.shape == (rows, columns)
    (PENALTY * naive).backward()
    torch.testing.assert_close(loss(None).detach(), PENALTY * naive.detach())
    for tensors, (a, b) in zip(pairs, own, strict=True):
        for weight, naive_weight in zip(tensors[-1], (a, b), strict=True):
            torch.testing.assert_close(weight.grad, naive_weight.grad, rtol=1e-4, atol=1e-4)
        assert all(weight.grad is None for pair in tensors[:-1] for weight in pair)
    layer, x = layers(tiny)[0], torch.randn(3, 5, 128)
    weight = layer.base_layer.weight + sum(1.5 * b @ a for a, b in pairs[0])
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_the_first_concept_has_no_penalty(tiny: Any) -> None:
    plan = apply(tiny, 0)
    assert plan.edits["c_lora"].loss is None
    assert plan.keeps == ()
    assert plan.trained == sum(2 * 2 * (128 + width) for width in (16, 32, 32, 32, 32, 16, 16))


def test_no_penalty_where_the_past_changed_nothing(tiny: Any) -> None:
    """Entry by entry: a new delta is free on weights that no earlier one touched."""
    loss = apply(tiny, 1).edits["c_lora"].loss
    assert loss is not None
    for layer in layers(tiny):
        for task, kept in ((0, slice(0, 5)), (1, slice(5, None))):
            _, up = fill(layer, task)
            with torch.no_grad():
                rows = torch.zeros_like(up)
                rows[kept] = up[kept]
                up.copy_(rows)
    assert float(loss(None).detach()) == 0
    fill(layers(tiny)[0], 1)
    assert float(loss(None).detach()) > 0


def test_three_concepts_one_after_another(
    tiny_folder: Path,
    open_folder: Callable[[Path], Any],
    train: Callable[..., list[float]],
    tmp_path: Path,
    save: Callable[..., dict[str, Tensor]],
) -> None:
    """Each run starts from the one before: its tensors stand, nothing of them changes, the output
    before training is the same."""
    stored: dict[str, Tensor] = {}
    before: Path | None = None
    output = None
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0))
    for task in range(3):
        backbone = open_folder(tiny_folder)
        plan = apply(backbone, task)
        assert all(f".c_lora-{task}." in name for name in plan.names)
        if before is not None:
            start_from(before, backbone, plan)
            torch.testing.assert_close(layers(backbone)[0](x), output)
        train(backbone, plan)
        own = dict(backbone.named_parameters())
        for name, value in stored.items():
            assert torch.equal(own[name], value)
        before = tmp_path / f"{task}.safetensors"
        stored = save(before, backbone, plan)
        output = layers(backbone)[0](x).detach()
    assert len(stored) == 3 * 2 * 14


def test_folded_into_the_weights(tiny: Any) -> None:
    apply(tiny, 2)
    for layer in layers(tiny):
        for task in range(3):
            fill(layer, task)
    x = torch.randn(3, 5, 128)
    wanted = [layer(x).detach() for layer in layers(tiny)]
    fold(tiny)
    for layer, value in zip(layers(tiny), wanted, strict=True):
        assert type(layer) is nn.Linear
        torch.testing.assert_close(layer(x), value, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_another_method_is_named(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"methods\.c_lora and methods\.lora both claim the adapt"):
        apply_methods(tiny, methods_of({"c_lora": {"rank": 2}, "lora": {"rank": 2}}))


def test_a_first_adapter_cannot_start_from_a_second(
    tiny_folder: Path,
    open_folder: Callable[[Path], Any],
    tmp_path: Path,
    save: Callable[..., dict[str, Tensor]],
) -> None:
    later, earlier = open_folder(tiny_folder), open_folder(tiny_folder)
    plan = apply(later, 1)
    path = tmp_path / "1.safetensors"
    save(path, later, plan)
    plan = apply(earlier, 0)
    with pytest.raises(ValueError, match=r"adapter of this recipe stores no .*c_lora-1"):
        start_from(path, earlier, plan)
