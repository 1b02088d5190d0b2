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
