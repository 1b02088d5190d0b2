"""TREAD: tokens that pass blocks by in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.__main__ import main
from trainer.attention.context import StepContext, use
from trainer.backbones.gradient_checkpointing import Recompute
from trainer.common.exit_codes import BAD_RECIPE
from trainer.config.load import methods_of
from trainer.methods.apply import Plan, apply_methods

Predict = Callable[[Any], Tensor]


def add(backbone: Any, **options: Any) -> Plan:
    return apply_methods(backbone, methods_of({"tread": options, "lora": {"rank": 2}}))


def in_training(backbone: Any, predict: Predict, t: int = 5) -> Tensor:
    with use(StepContext(0, 1, torch.tensor([t, t + 1]), training=True)):
        return predict(backbone)


def test_routed_tokens_are_what_they_were(dit: Any, predict: Predict) -> None:
    """The block between sees the tokens that stay, in their order; the others come out of the last
    block as they came out of the first."""
    blocks = dit.denoiser.transformer_blocks
    whole: list[Tensor] = []
    blocks[0].register_forward_hook(lambda _, args, y: whole.append(y))
    add(dit, ratio=0.25, last=0)
    given: list[Tensor] = []
    blocks[1].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    ends: list[Tensor] = []
    blocks[1].register_forward_hook(lambda _, args, y: ends.append(y))
    in_training(dit, predict)
    chosen = []
    for row in range(2):
        stays = [
            i for i in range(16) if any(torch.equal(whole[0][row, i], x) for x in given[0][row])
        ]
        assert len(stays) == 12 and torch.equal(given[0][row], whole[0][row, stays])
        routed = [i for i in range(16) if i not in stays]
        assert torch.equal(ends[0][row, routed], whole[0][row, routed])
        assert not any(torch.equal(ends[0][row, i], whole[0][row, i]) for i in stays)
        chosen.append(stays)
    assert chosen[0] != chosen[1]
    in_training(dit, predict)
    assert torch.equal(given[1], given[0])
    in_training(dit, predict, 6)
    assert not torch.equal(given[2], given[0])


def test_sampling_sees_all_tokens_and_ratio_0_changes_no_bit(dit: Any, predict: Predict) -> None:
    base = predict(dit)
    trained = in_training(dit, predict)
    add(dit, ratio=0.5, last=0)
    assert torch.equal(predict(dit), base)
    assert not torch.equal(in_training(dit, predict), trained)


def test_gradients_reach_all_tokens(dit: Any, predict: Predict) -> None:
    first: list[Tensor] = []
    dit.denoiser.transformer_blocks[0].register_forward_hook(
        lambda _, args, y: (y.retain_grad(), first.append(y))[0]
    )
    add(dit, ratio=0.5, last=0)
    in_training(dit, predict).square().sum().backward()
    assert bool((first[0].grad.abs().sum(-1) > 0).all())


@pytest.mark.parametrize("every", [1, 2])
def test_blocks_that_are_calculated_again_are_refused_at_once(every: int, dit: Any) -> None:
    add(dit, ratio=0.5, last=0)
    with pytest.raises(ValueError, match=r"methods\.tread keeps .*checkpointing=feed_forward"):
        dit.enable_gradient_checkpointing(Recompute(every))


def test_check_refuses_it_before_a_run(capsys: Any) -> None:
    words = ["recipe=tread", "run.gradient_checkpointing=true"]
    assert main(["check", *words]) == BAD_RECIPE
    assert "methods.tread keeps tokens of one block" in capsys.readouterr().err


def test_feed_forward_layers_may_be_calculated_again(dit: Any, predict: Predict) -> None:
    trained = [dit.get_parameter(name) for name in add(dit, ratio=0.5, last=0).stored]
    found = []
    for _ in range(2):
        found.append(torch.autograd.grad(in_training(dit, predict).square().sum(), trained))
        dit.enable_gradient_checkpointing(Recompute(feed_forward=True))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other)


def test_a_route_past_no_block_is_refused(dit: Any, tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"first=1 and last=1 leave no block .* at most 2 blocks"):
        add(dit)
    with pytest.raises(ValueError, match=r"methods\.tread: it leaves tokens out"):
        add(tiny)
