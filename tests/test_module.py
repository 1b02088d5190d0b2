"""The module's optimiser: one lr for all, or one of a method's own."""

from __future__ import annotations

from typing import Any

import pytest

from trainer import methods
from trainer.module import DiffusionModule, Optim
from trainer.objective import Objective
from trainer.recipe import methods_of

METHODS = {"selective": {"sites": "cross"}, "new_token": {"tokens": ["<v1>"], "init": "fox"}}


@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
def test_a_method_may_have_an_lr_of_its_own(own: bool, tiny: Any) -> None:
    plan = methods.apply(tiny, methods_of(METHODS))
    token = plan.edits["new_token"].trains
    lrs = dict.fromkeys(token, 1e-2) if own else {}
    objective = Objective(tiny.target, tiny.alphas_cumprod)
    optim = Optim(1e-4, 10, warmup=3)
    module = DiffusionModule(tiny, objective, optim, plan.names, lrs=lrs)
    found = module.configure_optimizers()
    groups = found["optimizer"].param_groups
    by_id = {id(p): group["lr"] for group in groups for p in group["params"]}
    factor = optim.factor(0)  # the schedule is already at its first step, for every group
    for name, parameter in module.trainable().items():
        wanted = 1e-2 if own and name in token else 1e-4
        assert by_id[id(parameter)] == pytest.approx(wanted * factor)
    assert len(groups) == 1 + own
