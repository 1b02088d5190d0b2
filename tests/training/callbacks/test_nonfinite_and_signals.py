"""Which micro-batches of a step are named when a value is not finite. What the run then does is
tried on whole runs in tests/faults/test_nonfinite.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.training.callbacks.nonfinite_and_signals import StepChecks

NAN = float("nan")


@pytest.mark.parametrize(
    ("losses", "named"),
    [([0.5, NAN], [("nan", ["b.png"])]), ([0.5, 0.25], [("1.0", ["a.png"]), ("0.5", ["b.png"])])],
    ids=["a loss", "a gradient alone"],
)
def test_the_batches_at_fault_are_named(losses: list[float], named: Any) -> None:
    """Those with such a loss; all of the step where only the gradient is not finite."""
    batches = [(6, ["a.png"]), (7, ["b.png"])]
    checks: Any = SimpleNamespace(batches=batches, losses=[torch.tensor(each) for each in losses])
    trainer: Any = SimpleNamespace(global_rank=1, accumulate_grad_batches=2)
    found = StepChecks._found(checks, trainer)
    assert [(each["loss"], each["keys"]) for each in found] == named
    assert {each["rank"] for each in found} == {1}
    steps = {"a.png": 6, "b.png": 7}
    assert all(each["micro_step"] == steps[each["keys"][0]] for each in found)
