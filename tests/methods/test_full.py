"""Full training: every parameter of the parts asked for, none of the others."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.methods.apply import apply_methods
from trainer.methods.weight.full import Full


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        pytest.param({}, {"unet"}, id="denoiser"),
        pytest.param({"text_encoder": True}, {"unet", "text_encoder"}, id="both"),
        pytest.param({"denoiser": False, "text_encoder": True}, {"text_encoder"}, id="text"),
    ],
)
def test_trains_every_parameter_of_its_parts(
    options: dict[str, bool], parts: set[str], tiny: Any, train: Any
) -> None:
    plan = apply_methods(tiny, {"full": Full(**options)})
    wanted = {n for n, _ in tiny.named_parameters() if n.split(".")[0] in parts}
    assert set(plan.names) == wanted
    before = {name: value.detach().clone() for name, value in tiny.named_parameters()}
    train(tiny, plan)
    changed = {n for n, value in tiny.named_parameters() if not value.equal(before[n])}
    assert changed == wanted


def test_the_plan_counts_them(tiny: Any) -> None:
    plan = apply_methods(tiny, {"full": Full()})
    assert plan.trained == sum(value.numel() for value in tiny.unet.parameters())
    assert plan.total == sum(value.numel() for value in tiny.parameters())
    assert plan.trained_bytes == 4 * plan.trained
    assert len(plan.edits["full"].sites) == len(tiny.sites) == 14


def test_nothing_to_train_is_refused(tiny: Any) -> None:
    with pytest.raises(
        ValueError, match=r"methods\.full: denoiser and text_encoder are both false"
    ):
        apply_methods(tiny, {"full": Full(denoiser=False)})


def test_the_sites_of_an_untrained_denoiser_are_not_claimed(tiny: Any) -> None:
    plan = apply_methods(tiny, {"full": Full(denoiser=False, text_encoder=True)})
    assert plan.edits["full"].sites == ()
