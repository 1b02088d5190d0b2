"""AT-EDM: tokens that are dropped after the first block of a stack and recovered at its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.context import StepContext, use
from trainer.config.load import methods_of
from trainer.kernels.page_rank import attention_map, page_rank
from trainer.methods.apply import Plan, apply_methods

Predict = Callable[[Any], Tensor]


@pytest.fixture
def stacked(stacked_folder: Path, open_folder: Callable[[Path], Any]) -> Any:
    return open_folder(stacked_folder)


def add(backbone: Any, **options: Any) -> Plan:
    return apply_methods(backbone, methods_of({"at_edm": options}), trains=False)


def at_step(backbone: Any, predict: Predict, step: int) -> Tensor:
    with torch.no_grad(), use(StepContext(step, 10, torch.tensor(0))):
        return predict(backbone)


def test_tokens_are_dropped_and_given_back(dit: Any, predict: Predict) -> None:
    """By hand: the first block on all tokens, the last on the most important half; each other token
    is then the kept one that it attends to the most."""
    seen: dict[str, Any] = {}
    blocks = dit.denoiser.transformer_blocks

    def keep(name: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, y: Tensor) -> None:
            seen[name] = args[0] if args else None, y

        return hook

    attn = blocks[0].attn1
    attn.register_forward_hook(keep("attn"), with_kwargs=True)
    blocks[0].register_forward_hook(keep("first"), with_kwargs=True)
    add(dit, ratio=0.5, dense=0, stride=1, iterations=4)
    given: list[Tensor] = []
    blocks[1].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    ends: list[Tensor] = []
    blocks[1].register_forward_hook(lambda _, args, y: ends.append(y))
    inner: list[Tensor] = []
    blocks[1].ff.register_forward_hook(lambda _, args, y: inner.append(y))
    at_step(dit, predict, 0)
    x, whole = seen["attn"][0], seen["first"][1]
    with torch.no_grad():
        q, k = (f(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k))
        s = page_rank(attention_map(q, k), iterations=4)
    for row in range(2):
        kept = sorted(s[row].argsort(descending=True)[:8].tolist())
        torch.testing.assert_close(given[0][row], whole[row, kept])
        logs = sum(
            (q[row, h] @ k[row, h].T * attn.scale).log_softmax(-1) for h in range(attn.heads)
        )
        assert inner[0].shape[1] == 8
        for token in range(16):
            own = token if token in kept else max(kept, key=lambda j: float(logs[token, j]))
            torch.testing.assert_close(ends[0][row, token], ends[0][row, own])
        left = [token for token in range(16) if token not in kept]
        assert left and not torch.equal(ends[0][row, kept[0]], ends[0][row, kept[1]])


def test_the_first_stack_of_every_stage_waits(stacked: Any, predict: Predict) -> None:
    """Down blocks of the test U-Net have one attention each, so at first only the middle drops."""
    plan = add(stacked, ratio=0.5, dense=0.3)
    counts: dict[str, int] = {}
    for site in stacked.sites:
        if site.kind == "self":
            site.module.register_forward_pre_hook(
                lambda _, args, name=site.name: counts.__setitem__(name, args[0].shape[1])
            )
    lasts = [name for name in plan.edits["at_edm"].sites if name.endswith("1.attn1")]
    at_step(stacked, predict, 2)
    early = {name: counts[name] for name in lasts}
    at_step(stacked, predict, 3)
    for name in lasts:
        first = name.replace("blocks.1.attn1", "blocks.0.attn1")
        waits = "attentions.0" in name
        assert counts[name] == counts[first] // 2
        assert early[name] == (counts[first] if waits else counts[first] // 2)


def test_dropping_nothing_changes_no_bit(stacked: Any, dit: Any, predict: Predict) -> None:
    for model in (stacked, dit):
        base = at_step(model, predict, 5)
        add(model, ratio=0)
        assert torch.equal(at_step(model, predict, 5), base)


def test_a_backbone_without_stacks_is_refused(tiny: Any) -> None:
    with pytest.raises(
        ValueError, match=r"methods\.at_edm: it leaves tokens out of the blocks after"
    ):
        add(tiny)


def test_a_map_is_needed(dit: Any) -> None:
    tree = {"at_edm": {}, "linear_attention": {}, "selective": {}}
    with pytest.raises(ValueError, match="needs the map of softmax attention, and the kernel of"):
        apply_methods(dit, methods_of(tree))


def test_lora_trains_over_it(dit: Any, train: Callable[..., list[float]]) -> None:
    plan = apply_methods(dit, methods_of({"at_edm": {}, "lora": {"rank": 2}}))
    assert all(torch.isfinite(torch.tensor(train(dit, plan))))
