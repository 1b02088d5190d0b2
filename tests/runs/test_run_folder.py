"""The run folder: when a run is finished, and which keys make it another run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.config.load import load_recipe
from trainer.runs.adapter import save_adapter
from trainer.runs.run_folder import differing_keys, folder_for, is_finished, recipe_header

BASIC = ["recipe=lora", "data.token=<v1>"]


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("backbone=tiny_dit", "backbone"),
        ("data.prior_weight=0.5", "data"),
        ("methods.lora.rank=3", "methods"),
        ("objective.offset_noise=0.1", "objective"),
        ("optim.lr=0.5", "optim"),
        ("run.batch_size=3", "run.batch_size"),
        ("run.accumulate=3", "run.accumulate"),
        ("run.seed=3", "run.seed"),
        ("run.resolution=32", "run.resolution"),
        ("run.precision=bf16", "run.precision"),
        ("run.cache_latents=false", "run.cache_latents"),
    ],
)
def test_what_makes_it_another_run(word: str, key: str) -> None:
    stored = recipe_header(load_recipe(BASIC))
    assert differing_keys(stored, load_recipe(BASIC)) == []
    assert key in differing_keys(stored, load_recipe([*BASIC, word]))


@pytest.mark.parametrize(
    "word", ["run.workers=0", "run.log_every=3", "run.steps=7", "preview.every=3", "run.id=other"]
)
def test_what_may_change_on_resuming(word: str) -> None:
    stored = recipe_header(load_recipe(BASIC))
    assert differing_keys(stored, load_recipe([*BASIC, word])) == []


def test_a_run_is_finished_once_it_has_done_all_steps(tmp_path: Path) -> None:
    recipe = load_recipe([*BASIC, "run.steps=4"])
    assert not is_finished(tmp_path, recipe)
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, {"x": torch.ones(1)}, tree=recipe_header(recipe), identity={"name": "x"})
    found = {
        steps: is_finished(tmp_path, load_recipe([*BASIC, f"run.steps={steps}"]))
        for steps in (3, 4, 5)
    }
    assert found == {3: True, 4: True, 5: False}
    with pytest.raises(ValueError, match=r"holds a finished run with another run\.seed; choose"):
        is_finished(tmp_path, load_recipe([*BASIC, "run.steps=4", "run.seed=9"]))


def test_the_folder_and_what_adapters_keep_of_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe([*BASIC, f"run.out={tmp_path}", "run.id=one", "run.seed=3"])
    assert folder_for(recipe) == tmp_path / "lora" / "one"
    assert recipe_header(recipe)["recipe"] == "lora"
    assert recipe_header(recipe)["run"]["seed"] == 3
    assert not {"out", "id", "start_from"} & set(recipe_header(recipe)["run"])
