"""Flash as a method: the backend asked for runs at every site, and the log says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer import methods
from trainer.methods.function.flash import Flash
from trainer.methods.weight.lora import Lora


@pytest.mark.parametrize("backend", ["auto", "flash", "math"])
def test_what_ran_is_logged_for_every_site(
    backend: Any, tiny: Any, predict: Callable[[Any], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    base = predict(tiny)
    methods.apply(tiny, {"flash": Flash(backend=backend), "lora": Lora()})
    with caplog.at_level(logging.INFO, "trainer.attention.kernels.flash"):
        output = predict(tiny)
    torch.testing.assert_close(output, base, rtol=1e-4, atol=1e-5)
    ran = "flash" if backend == "auto" else backend
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(tiny.sites)
    for site in tiny.sites:
        assert sum(line.startswith(f"{site.name}: {ran} ran for q 2x") for line in lines) == 1


def test_a_backend_that_is_not_there_is_refused_by_site(
    tiny: Any, predict: Callable[[Any], Tensor]
) -> None:
    methods.apply(tiny, {"flash": Flash(backend="cudnn"), "lora": Lora()})
    with pytest.raises(ValueError) as error:
        predict(tiny)
    assert str(error.value).startswith(f"methods.flash at {tiny.sites[0].name}: backend 'cudnn'")
    assert "choose one of flash, math" in str(error.value)


def test_gradients_are_the_base_models(
    tiny: Any,
    tiny_folder: Any,
    open_folder: Callable[..., Any],
    predict: Callable[[Any], Tensor],
) -> None:
    found = []
    for backbone, chosen in ((tiny, {}), (open_folder(tiny_folder), {"flash": Flash()})):
        plan = methods.apply(backbone, {**chosen, "lora": Lora()})
        predict(backbone).square().sum().backward()
        parameters = dict(backbone.named_parameters())
        found.append([parameters[name].grad for name in plan.names])
    for base, own in zip(*found, strict=True):
        torch.testing.assert_close(own, base)
