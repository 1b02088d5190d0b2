"""ToMA at the layers of a denoiser: the equation, for how many steps its choice serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.context import StepContext, use
from trainer.config.load import methods_of
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.kernels.soft_merging import Tiling, chosen_tokens, soft_groups
from trainer.methods.apply import Plan, apply_methods
from trainer.ops.reduction.toma import Facilities

Predict = Callable[[Any], Tensor]


def add(backbone: Any, **options: Any) -> Plan:
    return apply_methods(backbone, methods_of({"toma": options, "selective": {}}))


def planner_of(backbone: Any, plan: Plan) -> Facilities:
    (op,) = backbone.host.processors[plan.edits["toma"].sites[0]].ops
    planner: Facilities = op.planner
    return planner


def test_a_layer_runs_on_merged_tokens(tiny: Any, predict: Predict) -> None:
    plan = add(tiny, ratio=0.5, tile=4, sharpness=5)
    site = next(site for site in tiny.sites if site.name == plan.edits["toma"].sites[0])
    seen: list[tuple[Tensor, Tensor]] = []
    site.module.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    with torch.no_grad():
        predict(tiny)
    x, y = seen[0]
    tiling = Tiling((8, 8), (4, 4))
    groups = soft_groups(x, tiling, chosen_tokens(x, tiling, 8), sharpness=5)
    less, attn = groups.merge(x)[0], site.module
    with torch.no_grad():
        heads = [
            t.chunk(attn.heads, -1) for t in (attn.to_q(less), attn.to_k(less), attn.to_v(less))
        ]
        out = [
            (q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v for q, k, v in zip(*heads, strict=True)
        ]
        wanted = groups.unmerge(attn.to_out[0](torch.cat(out, -1))[None].expand(2, -1, -1))
    torch.testing.assert_close(y[0], wanted[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("choose", "share", "wanted"),
    [
        (4, 2, [(0, 0), (0, 0), (0, 2), (0, 2), (4, 4), (4, 4)]),
        (3, 2, [(0, 0), (0, 0), (0, 2), (3, 3), (3, 3), (3, 5)]),  # shares of others serve no more
        (2, 4, [(0, 0), (0, 0), (2, 2), (2, 2), (4, 4), (4, 4)]),
    ],
)
def test_the_choice_serves_for_some_steps_and_the_shares_no_longer(
    choose: int, share: int, wanted: list[tuple[int, int]], tiny: Any, predict: Predict
) -> None:
    plan = add(tiny, choose_every=choose, share_every=share)
    planner = planner_of(tiny, plan)
    made = []
    for step in range(6):
        with torch.no_grad(), use(StepContext(step, 6, torch.tensor(0))):
            predict(tiny)
        key = next(iter(planner.shared))
        made.append((planner.chosen[key][0], planner.shared[key][0]))
    assert made == wanted


def test_nothing_is_kept_between_samplings_or_in_training(tiny: Any, predict: Predict) -> None:
    plan = add(tiny)
    planner = planner_of(tiny, plan)
    look = Sampling(steps=2, guidance=2.0)
    first = sample(tiny, ["a fox"], [0], settings=look)
    assert not planner.shared and not planner.chosen
    assert torch.equal(sample(tiny, ["a fox"], [0], settings=look), first)
    predict(tiny)
    assert not planner.shared and not planner.chosen


def test_a_picture_is_the_same_beside_another(tiny: Any) -> None:
    add(tiny)
    look = Sampling(steps=2, guidance=2.0)
    alone = sample(tiny, ["a fox"], [1], settings=look)
    beside = sample(tiny, ["a tree", "a fox"], [0, 1], settings=look)
    torch.testing.assert_close(beside[1:], alone, atol=2e-3, rtol=0)
