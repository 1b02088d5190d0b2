"""A backbone that is trained towards another target, or on another path, than it was published
with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.backbones.retarget import is_retargeted, retarget
from trainer.config.load import load_recipe
from trainer.diffusion.sampler_loop import Denoising
from trainer.diffusion.sampling_settings import Sampling
from trainer.export.export import export
from trainer.runs.adapter import check_start, load_adapted, load_base
from trainer.training.fit import fit

X0 = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8)


def perfect(backbone: Any, target: str) -> Callable[..., Tensor]:
    """A network that knows the clean latents and answers what it is asked for."""

    def predict(x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        if backbone.alphas_cumprod is None:
            sigma = t.float() / 1000
            alpha = 1 - sigma
        else:
            squared = backbone.alphas_cumprod[t.long()]
            alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
        alpha, sigma = (part.reshape(-1, 1, 1, 1) for part in (alpha, sigma))
        noise = (x_t - alpha * X0) / sigma
        answers = {"eps": noise, "x0": X0.expand_as(x_t), "v": alpha * noise - sigma * X0}
        return (answers | {"flow": noise - X0})[target]

    return predict


@pytest.mark.parametrize(
    ("objective", "target"),
    [
        ({}, "v"),
        ({"target": "eps"}, "eps"),
        ({"target": "x0"}, "x0"),
        ({"target": "v", "path": "vp"}, "v"),
        ({"path": "flow"}, "flow"),
        ({"path": "flow", "target": "flow"}, "flow"),
    ],
)
def test_sampling_follows(objective: dict[str, Any], target: str, tiny: Any) -> None:
    """The sampler finds what a perfect network means, and only if it reads it as it was trained."""
    retarget(tiny, objective)
    assert tiny.target == target
    tiny.predict = perfect(tiny, target)
    text = tiny.encode_prompts(["a fox"])
    noise = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    found = Denoising(tiny, text, 1, Sampling(steps=50, guidance=1)).run(noise)
    assert (found - X0).abs().max() < 0.08
    assert is_retargeted(tiny) == (target != "v")


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ({"target": "flow"}, r"objective\.target=flow: samplers on the variance-preserving path"),
        ({"path": "flow", "target": "eps"}, r"samplers on the flow path take flow"),
    ],
)
def test_what_no_sampler_takes_is_refused(objective: Any, says: str, tiny: Any) -> None:
    with pytest.raises(ValueError, match=says):
        retarget(tiny, objective)
    assert not is_retargeted(tiny)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("retargeted")
    words = [
        "recipe=lora", f"backbone={tiny_folder}", "objective.target=eps", "run.steps=2",
        "data.prior_weight=0", "run.batch_size=2", "run.validate_every=2", "preview.every=0",
        f"run.out={out}", "run.id=one", "tracker=none",
    ]  # fmt: skip
    return fit(load_recipe(words))


def test_an_adapter_carries_its_target(run: Path, tiny_folder: Path) -> None:
    adapted, _ = load_adapted(run / "adapter.safetensors")
    assert adapted.target == "eps"
    assert adapted.scheduler().config.prediction_type == "epsilon"
    words = ["recipe=lora", f"backbone={run}", "data.class_word=animal"]
    again = load_base(load_recipe(words).backbone, "again")  # a run on top of it
    assert again.target == "eps"


def test_exports_that_cannot_say_so_are_refused(run: Path, tmp_path: Path) -> None:
    path = run / "adapter.safetensors"
    for name in ("kohya", "comfyui", "diffusers", "peft"):
        with pytest.raises(ValueError, match=rf"format={name} cannot carry .*target=eps.*merged"):
            export(path, tmp_path / name, name)
    merged = export(path, tmp_path / "merged", "merged", say=lambda line: None)
    text = (merged / "scheduler" / "scheduler_config.json").read_text()
    assert '"prediction_type": "epsilon"' in text


def test_a_run_starts_from_one_of_the_same_target(run: Path, tiny: Any) -> None:
    path = run / "adapter.safetensors"
    check_start(path, tiny, {"target": "eps", "path": None})
    with pytest.raises(ValueError, match=r"run\.start_from=.* predicts eps, and this recipe's v"):
        check_start(path, tiny, {"target": None, "path": None})
