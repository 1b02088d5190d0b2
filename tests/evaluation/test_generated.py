"""Pictures of an evaluation: kept for the base, and of other models until scores are stored."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config.load import load_recipe
from trainer.evaluation.generated import PictureMaker
from trainer.methods.apply import apply_methods
from trainer.methods.feature.gen1 import Gen1


def test_a_model_in_the_place_of_one_that_is_gone_has_pictures_of_its_own(
    tiny_folder: Path, open_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another, as adapters along the way are judged: memory is used again."""
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path))
    recipe = load_recipe(
        ["recipe=lora", f"backbone={tiny_folder}", "evaluate.steps=1", "data.prior_weight=0"]
    )
    base = open_folder(tiny_folder)
    maker = PictureMaker(recipe, batch_size=2, base=base, resumes=True)
    found = [maker.make(base, ["a fox"])]
    for number in range(3):
        model = open_folder(tiny_folder)
        with torch.no_grad():
            next(model.denoiser.parameters()).mul_(2.0 + number)
        found.append(maker.make(model, ["a fox"]))
        del model
        gc.collect()
    assert len({picture.numpy().tobytes() for picture in found}) == 4
    assert len(os.listdir(tmp_path / "generated")) == 4
    maker.finish()
    assert len(os.listdir(tmp_path / "generated")) == 1  # the base's serve later runs


def test_clips_have_the_inputs_of_their_prompts_and_another_guidance_in_time(
    tiny_folder: Path, open_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its own; what is kept of one set of inputs does not serve for another."""
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path))
    words = ["recipe=gen1", f"backbone={tiny_folder}", "evaluate.steps=1", "methods.lora=null"]
    words += ["methods.word_embedding=null", "run.start_from=null"]
    model = open_folder(tiny_folder)
    plan = apply_methods(model, {"gen1": Gen1(heads=2, structure=1)})
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in plan.names:
            parameters[name].add_(0.2 * torch.randn_like(parameters[name]))

    def made(depth: torch.Tensor | None, *more: str) -> torch.Tensor:
        recipe = load_recipe([*words, *more])
        maker = PictureMaker(recipe, batch_size=4, base=None, resumes=True)
        inputs = {} if depth is None else {"depth": depth}
        found = maker.make(model, ["a fox", "a fox", "a cow"], frames=2, inputs=inputs)
        return found.unflatten(0, (3, 2))

    depth = torch.randn(3, 2, 1, 32, 32)
    one, none = made(depth), made(None)
    other = made(torch.cat([depth[:1], -depth[1:2], depth[2:]]))
    assert torch.equal(other[[0, 2]], one[[0, 2]]) and not torch.equal(other[1], one[1])
    assert not torch.equal(none[0], one[0])
    assert not torch.equal(made(depth, "evaluate.temporal_guidance=3")[0], one[0])
    assert torch.equal(made(depth), one)
