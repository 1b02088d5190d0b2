"""SLA in a denoiser: what the projection does, what it starts from, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.call import SiteCall
from trainer.attention.context import StepContext
from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.kernels.sla import Shares, sparse_and_linear
from trainer.methods.apply import Plan, apply_methods

Predict = Callable[[Any], Tensor]


def add(backbone: Any, **options: Any) -> Plan:
    options = {"sites": "self & /1 | self & block", "block": 4, "critical": 0.25, **options}
    return apply_methods(backbone, methods_of({"sla": options, "selective": {}}))


@pytest.mark.parametrize("scale", [None, 0.2])
def test_the_output_is_the_sum_of_both_parts(
    scale: float | None, tiny: Any, randomise: Callable[..., None]
) -> None:
    plan = add(tiny)
    site = next(site for site in tiny.sites if site.name == plan.edits["sla"].sites[0])
    if scale is not None:
        site.module.scale_qk, site.module.scale = False, scale
    (op,) = tiny.host.processors[site.name].ops
    q, k, v = torch.randn(3, 1, site.heads, 16, site.head_dim, generator=torch.manual_seed(0))
    call = SiteCall(site, StepContext(0, 1, torch.tensor(0)))
    exact, linear = sparse_and_linear(q, k, v, shares=Shares(4, 0.25, 0.1), scale=scale)
    with torch.no_grad():
        assert torch.equal(op.kernel(q, k, v, mask=None, call=call), exact)
        randomise(tiny, plan, 0.5)
        own = op.kernel(q, k, v, mask=None, call=call)
        wanted = exact + linear @ op.of_linear.weight.T + op.of_linear.bias
    torch.testing.assert_close(own, wanted)


def test_all_blocks_critical_is_the_base(tiny: Any, dit: Any, predict: Predict) -> None:
    for model in (tiny, dit):
        base = predict(model)
        add(model, critical=1)
        assert torch.equal(predict(model), base)


def test_the_projection_trains(tiny: Any, predict: Predict) -> None:
    plan = add(tiny)
    own = [name for name in plan.names if ".sla." in name]
    assert len(own) == 2 * len(plan.edits["sla"].sites)
    predict(tiny).square().sum().backward()
    parameters = dict(tiny.named_parameters())
    assert all(bool(parameters[name].grad.any()) for name in own)


def test_bad_options_are_refused(tiny: Any, dit: Any, predict: Predict) -> None:
    with pytest.raises(RecipeError, match="leave nothing for linear attention; give less of one"):
        methods_of({"sla": {"critical": 0.5, "negligible": 0.5}})
    with pytest.raises(ValueError, match="is cross-attention, whose keys are few"):
        add(tiny, sites="cross")
    add(dit, block=64)
    with pytest.raises(ValueError, match=r"methods\.sla has one block of 64 tokens at .* has 16"):
        predict(dit)
