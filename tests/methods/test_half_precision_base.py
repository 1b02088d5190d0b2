"""A base in half precision stays so under every method that calculates with none of its weights,
and all methods start as on the same weights in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from method_examples import EXAMPLES, IN_STACKS, tree_of
from torch import Tensor

from trainer.config.load import methods_of
from trainer.methods.apply import apply_methods, method_names
from trainer.methods.weight.peft_adapter import TYPES

SIZES: dict[str, dict[str, Any]] = {  # of kinds whose own are too large for the tiny backbone
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 20},
    "miss": {"r": 4},
    "psoft": {"r": 4},
    "road": {"group_size": 4},
    "waveft": {"n_frequency": 20},
}


def adapter(kind: str) -> dict[str, Any]:
    return {"peft_adapter": {"type": kind, "sites": "cross", "options": SIZES.get(kind, {})}}


READING: dict[str, dict[str, Any]] = {
    "dora": {"dora": EXAMPLES["dora"]},
    "linear_attention": tree_of("linear_attention"),
    "soft, distilled": {"soft": {"ratio": 2, "distill": 1.0}},
    "lora, pissa": {"lora": {"rank": 2, "init": "pissa"}},
    "lora, olora": {"lora": {"rank": 2, "init": "olora"}},
    "tlora, weight": {"tlora": {"rank": 2, "init": "weight"}},
    **{
        f"peft_adapter, {kind}": adapter(kind)
        for kind in ("delora", "deft", "psoft", "supertuning")
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    **{name: tree_of(name) for name in method_names() if name not in READING},
    "linear_attention, not distilled": {"linear_attention": {}, "lora": {"rank": 2}},
    "lora, gaussian": {"lora": {"rank": 2, "init": "gaussian"}},
    "lora, eva": {"lora": {"rank": 2, "init": "eva"}},
    "tlora, zero": {"tlora": {"rank": 2, "init": "zero"}},
    **{
        f"peft_adapter, {kind}": adapter(kind)
        for kind in TYPES
        if f"peft_adapter, {kind}" not in READING
    },
}
HALF = torch.bfloat16


def tensors(model: Any) -> dict[str, Tensor]:
    return {
        name: value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())
    }


def rounded(model: Any) -> Any:
    """Its denoiser and text encoder in bf16."""
    model.denoiser.to(HALF)
    model.text_encoder.to(HALF)
    return model


@pytest.mark.sampled(12)
@pytest.mark.parametrize("tree", [*READING.values(), *OTHERS.values()], ids=[*READING, *OTHERS])
def test_the_base_keeps_its_precision_unless_it_is_read(
    tree: dict[str, Any],
    tiny_folder: Path,
    stacked_folder: Path,
    open_folder: Callable[[Path], Any],
) -> None:
    folder = stacked_folder if IN_STACKS & set(tree) else tiny_folder
    half, exact = (rounded(open_folder(folder)) for _ in range(2))
    exact.denoiser.float()
    exact.text_encoder.float()
    before = {id(value) for value in half.parameters() if value.dtype == HALF}
    methods = methods_of(tree)
    plan = apply_methods(half, methods, seed=3)
    apply_methods(exact, methods, seed=3)
    reads = tree in READING.values()
    assert any(method.reads_weights for method in methods.values()) == reads
    stored = {name for name, value in half.named_parameters() if name in plan.stored}
    frozen = [
        value
        for name, value in half.named_parameters()
        if id(value) in before and name not in stored
    ]
    assert {value.dtype for value in frozen} <= {torch.float32 if reads else HALF}
    found, wanted = tensors(half), tensors(exact)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value.is_floating_point():
            assert torch.equal(found[name].float(), value.float()), name
        else:
            assert torch.equal(found[name], value), name


def test_every_method_is_in_one_of_the_lists() -> None:
    named = {name.partition(",")[0] for name in (*READING, *OTHERS)}
    assert named == set(method_names())
