"""Tiled attention as a method: the same output and gradients at every site, with the model's own
masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.methods.apply import apply_methods
from trainer.methods.function.tiled import Tiled
from trainer.methods.weight.full import Full


@pytest.mark.parametrize("folder", ["tiny_folder", "dit_folder"])
def test_output_and_gradients_are_the_base_models(
    folder: str,
    request: pytest.FixtureRequest,
    open_folder: Callable[..., Any],
    predict: Callable[[Any], Any],
) -> None:
    found = []
    for chosen in ({}, {"tiled": Tiled(rows=5, columns=7)}):
        backbone = open_folder(request.getfixturevalue(folder))
        plan = apply_methods(backbone, {**chosen, "full": Full()})
        output = predict(backbone)
        output.square().sum().backward()
        parameters = dict(backbone.named_parameters())
        found.append([output, *(parameters[name].grad for name in plan.names)])
    for base, own in zip(*found, strict=True):
        assert (base is None) == (own is None)
        if base is not None:
            torch.testing.assert_close(own, base, rtol=1e-3, atol=1e-4)


def test_runs_at_the_chosen_sites_and_claims_their_kernel(tiny: Any) -> None:
    plan = apply_methods(tiny, {"tiled": Tiled(sites="cross"), "full": Full()})
    installed = {name for name, p in tiny.host.processors.items() if p.ops}
    assert installed == {site.name for site in tiny.sites if site.kind == "cross"}
    assert set(plan.edits["tiled"].claims) == {
        (f"{tiny.denoiser_name}.{name}", "the kernel") for name in installed
    }


def test_tiles_are_of_the_size_that_is_asked_for(tiny: Any) -> None:
    apply_methods(tiny, {"tiled": Tiled(rows=16, columns=24), "full": Full()})
    found = {(op.rows, op.columns) for p in tiny.host.processors.values() for op in p.ops}
    assert found == {(16, 24)}


def test_alone_it_trains_nothing(tiny: Any) -> None:
    with pytest.raises(ValueError, match="nothing would train with methods tiled"):
        apply_methods(tiny, {"tiled": Tiled()})


@pytest.mark.parametrize("options", [{"rows": 0}, {"columns": -1}])
def test_refused_before_loading(options: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=rf"methods\.tiled\.{next(iter(options))}="):
        methods_of({"tiled": options})
