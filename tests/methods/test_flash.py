"""Flash as a method: the backend asked for runs at every site, and the run says so."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from trainer.attention.op import Traits
from trainer.config.load import load_recipe
from trainer.methods.apply import apply_methods
from trainer.methods.function.flash import Flash
from trainer.methods.weight.lora import Lora
from trainer.training.plan_report import report_backends


@pytest.mark.parametrize("backend", ["auto", "flash", "math"])
def test_what_ran_is_logged_for_every_site(
    backend: Any, tiny: Any, predict: Callable[[Any], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    base = predict(tiny)
    apply_methods(tiny, {"flash": Flash(backend=backend), "lora": Lora()})
    with caplog.at_level(logging.INFO, "trainer.kernels.flash"):
        output = predict(tiny)
    torch.testing.assert_close(output, base, rtol=1e-4, atol=1e-5)
    ran = "flash" if backend == "auto" else backend
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(tiny.sites)
    for site in tiny.sites:
        assert sum(line.startswith(f"{site.name}: {ran} ran for q 2x") for line in lines) == 1


@pytest.mark.parametrize("family", ["unet", "dit"])
def test_a_run_tells_what_ran_and_keeps_it_site_by_site(
    family: str,
    tiny_folder: Path,
    dit_folder: Path,
    open_folder: Callable[[Path], Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from trainer.training.fit import fit

    folder = tiny_folder if family == "unet" else dit_folder
    words = ["recipe=linear_swap", "methods.linear_attention=null", "methods.flash={}"]
    words += [f"backbone={folder}", "run.steps=2", "run.batch_size=2", "run.accelerator=cpu"]
    words += ["data.count=8", "data.validation=0", "preview.prompts=[]", "run.checkpoint_every=0"]
    run = fit(load_recipe([*words, "tracker=none", "optim.ema=null"]), tmp_path / "run")
    sites = [site.name for site in open_folder(folder).sites]
    told = json.loads((run / "plan.json").read_text())["methods"]
    assert told["flash"]["ran"] == {site: ["flash"] for site in sites}
    assert "ran" not in told["selective"]
    line = f"methods.flash: flash ran at all {len(sites)} sites"
    assert capsys.readouterr().err.count(line) == 1


def test_sites_that_fell_back_are_told_by_name(
    tiny: Any, predict: Callable[[Any], Tensor], tmp_path: Path
) -> None:
    class Narrow:
        """Values with another layout in memory, which no fused kernel of a CPU takes."""

        name = "narrow"
        traits = Traits()

        def kv(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
            return q, k, v.mT.contiguous().mT

    plan = apply_methods(tiny, {"flash": Flash(backend="auto"), "lora": Lora()})
    first, *others = [site.name for site in tiny.sites]
    tiny.host.install(Narrow(), tiny.sites[:1])
    predict(tiny)
    (tmp_path / "plan.json").write_text('{"methods": {"flash": {}, "lora": {}}}')
    text = StringIO()
    report_backends(plan, tmp_path, Console(file=text, width=40))
    assert text.getvalue().splitlines() == [
        f"methods.flash: math ran at {first}",
        f"methods.flash: flash ran at {', '.join(others)}",
    ]
    kept = json.loads((tmp_path / "plan.json").read_text())["methods"]["flash"]["ran"]
    assert kept == {first: ["math"], **{name: ["flash"] for name in others}}


def test_methods_with_nothing_to_tell_leave_the_plan_alone(tiny: Any, tmp_path: Path) -> None:
    text = StringIO()
    report_backends(apply_methods(tiny, {"lora": Lora()}), tmp_path, Console(file=text))
    assert text.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_is_not_there_is_refused_by_site(
    tiny: Any, predict: Callable[[Any], Tensor]
) -> None:
    apply_methods(tiny, {"flash": Flash(backend="cudnn"), "lora": Lora()})
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
        plan = apply_methods(backbone, {**chosen, "lora": Lora()})
        predict(backbone).square().sum().backward()
        parameters = dict(backbone.named_parameters())
        found.append([parameters[name].grad for name in plan.names])
    for base, own in zip(*found, strict=True):
        torch.testing.assert_close(own, base)
