"""Modules that belong to no attention site: registered by name by a small method, trained, stored
in the adapter, found again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from trainer.attention.call import SiteCall
from trainer.attention.extras import register_extra
from trainer.attention.op import Traits
from trainer.config import load
from trainer.methods.apply import apply_methods, find_method, method_names
from trainer.methods.method import Edit, Method
from trainer.runs.adapter import load_adapted, save_adapter

Predict = Callable[[Any], Tensor]
HEADER = {"projector": {"called": "picture"}}


class Projected:
    """What cross-attention reads is moved by the projector of the method."""

    name = "projected"
    traits = Traits(owner="projector")

    def __init__(self, projector: nn.Module) -> None:
        self.projector = projector

    def context(self, k_ctx: Tensor, v_ctx: Tensor, call: SiteCall) -> tuple[Tensor, Tensor]:
        return k_ctx, v_ctx + self.projector(v_ctx)


class Projector(Method):
    """One projector beside the model, which all cross-attention reads through."""

    kind: ClassVar[Literal["attention"]] = "attention"
    called: str = "picture"

    def apply(self, model: Any) -> Edit:
        projector = nn.Linear(model.text_width, model.text_width)
        nn.init.zeros_(projector.weight)
        nn.init.zeros_(projector.bias)
        trains = register_extra(model, self.called, projector, owner="projector")
        sites = [site for site in model.sites if site.kind == "cross"]
        model.host.install(Projected(projector), sites)
        return Edit(
            sites=tuple(site.name for site in sites),
            claims=tuple((name, "weight") for name in trains),
            trains=trains,
        )


@pytest.fixture(autouse=True)
def found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method stands in this file, not in a folder of methods."""
    names = [*method_names(), "projector"]
    monkeypatch.setattr(load, "method_names", lambda: names)
    monkeypatch.setattr(
        load, "find_method", lambda name: Projector if name == "projector" else find_method(name)
    )


def test_it_trains_is_stored_and_found_again(
    tiny: Any, tiny_folder: Path, predict: Predict, train: Callable[..., Any], tmp_path: Path
) -> None:
    base = predict(tiny)
    before = {name: value.clone() for name, value in tiny.named_parameters()}
    plan = apply_methods(tiny, {"projector": Projector()})
    names = ("extras.picture.bias", "extras.picture.weight")
    assert plan.names == names
    assert torch.equal(predict(tiny), base)
    train(tiny, plan)
    assert all(bool(tiny.get_parameter(name).any()) for name in names)
    now = dict(tiny.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items())
    trained = predict(tiny)
    assert not torch.equal(trained, base)

    file = tmp_path / "adapter.safetensors"
    header = {"backbone": str(tiny_folder), "methods": HEADER}
    save_adapter(file, {name: now[name] for name in plan.stored}, header, tiny.identity())
    with safe_open(file, "pt") as stored:
        assert set(stored.keys()) == set(names)
    loaded, _ = load_adapted(file)
    assert set(loaded.extras) == {"picture"} and loaded.extras.owners == {"picture": "projector"}
    assert torch.equal(predict(loaded), trained)


def test_a_stock_pipeline_has_no_place_for_it(tiny: Any) -> None:
    from trainer.export.formats.merged import merge

    assert merge(copy.deepcopy(tiny)).denoiser is not tiny.denoiser
    apply_methods(tiny, {"projector": Projector()})
    with pytest.raises(ValueError, match=r"format=merged cannot carry extras\.picture, 1 such"):
        merge(tiny)


def test_a_copy_has_a_projector_of_its_own(tiny: Any, predict: Predict) -> None:
    apply_methods(tiny, {"projector": Projector()})
    twin = copy.deepcopy(tiny)
    base = predict(twin)
    with torch.no_grad():
        twin.extras["picture"].bias.fill_(1.0)
    assert not torch.equal(predict(twin), base)
    assert torch.equal(predict(tiny), base)


def test_a_name_that_is_taken_is_refused_with_both_methods(tiny: Any) -> None:
    methods = {"projector": Projector(), "other": Projector()}
    with pytest.raises(ValueError) as error:
        apply_methods(tiny, methods)
    message = str(error.value)
    assert "methods.projector and methods.other both claim the name of extras.picture" in message
    assert list(tiny.extras) == ["picture"]


@pytest.mark.parametrize("name", ["a.b", "", "owners", "training"])
def test_what_is_no_name_of_a_module_is_refused(name: str, tiny: Any) -> None:
    with pytest.raises(ValueError, match="is no name for an extra module"):
        register_extra(tiny, name, nn.Linear(2, 2), owner="mine")
    assert not tiny.extras
