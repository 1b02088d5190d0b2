"""The run folder: when a run is finished, and which keys make it another run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
import torch

from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.runs.adapter import save_adapter
from trainer.runs.run_folder import (
    folder_for,
    is_finished,
    later_checkpoint,
    locked,
    recipe_header,
    step_name,
)

ROOT = Path(__file__).parents[2]
BASIC = ["recipe=lora", "data.token=<v1>"]


@pytest.mark.parametrize(
    "word",
    [
        "backbone=tiny_dit",
        "data.prior_weight=0.5",
        "methods.lora.rank=3",
        "objective.offset_noise=0.1",
        "optim.lr=0.5",
        "run.batch_size=3",
        "run.seed=3",
    ],
)
def test_a_finished_run_of_another_recipe_is_refused(word: str, tmp_path: Path) -> None:
    recipe = load_recipe([*BASIC, "run.steps=4"])
    finished(tmp_path, recipe)
    key = word.partition("=")[0]
    says = rf"holds a finished run with another .*{key}.*; choose another run\.id"
    with pytest.raises(ValueError, match=says):
        is_finished(tmp_path, load_recipe([*BASIC, "run.steps=4", word]))


@pytest.mark.parametrize(
    "word", ["run.workers=0", "run.log_every=3", "preview.every=3", "run.id=other", "tracker=none"]
)
def test_what_is_free_changes_no_finished_run(word: str, tmp_path: Path) -> None:
    finished(tmp_path, load_recipe([*BASIC, "run.steps=4"]))
    assert is_finished(tmp_path, load_recipe([*BASIC, "run.steps=4", word]))


def finished(folder: Path, recipe: Recipe) -> None:
    path = folder / "adapter.safetensors"
    save_adapter(path, {"x": torch.ones(1)}, tree=recipe_header(recipe), identity={"name": "x"})


def test_a_run_is_finished_once_it_has_done_all_steps(tmp_path: Path) -> None:
    recipe = load_recipe([*BASIC, "run.steps=4"])
    assert not is_finished(tmp_path, recipe)
    finished(tmp_path, recipe)
    assert is_finished(tmp_path, recipe)
    with pytest.raises(ValueError, match=r"finished run of 4 steps, more than run\.steps=3"):
        is_finished(tmp_path, load_recipe([*BASIC, "run.steps=3"]))
    more = load_recipe([*BASIC, "run.steps=5"])
    says = r"4 steps and no checkpoint to go on from to run\.steps=5; .*run\.start_from="
    with pytest.raises(ValueError, match=says):
        is_finished(tmp_path, more)
    (tmp_path / "checkpoints" / "step-000004").mkdir(parents=True)
    assert not is_finished(tmp_path, more)


def test_the_folder_and_what_adapters_keep_of_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe([*BASIC, f"run.out={tmp_path}", "run.id=one", "run.seed=3"])
    assert folder_for(recipe) == tmp_path / "lora" / "one"
    assert recipe_header(recipe)["recipe"] == "lora"
    assert recipe_header(recipe)["run"]["seed"] == 3
    assert not {"out", "id", "start_from"} & set(recipe_header(recipe)["run"])


HOLD = """
import sys
from pathlib import Path
from trainer.runs.run_folder import locked
with locked(Path(sys.argv[1])):
    print("has it", flush=True)
    sys.stdin.readline()
"""


def test_of_two_processes_one_has_the_folder(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdin=PIPE, stdout=PIPE, text=True, cwd=ROOT) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "has it\n"
        says = rf"process {other.pid} on .* is training there; wait until it ends, or choose"
        for _ in range(2):
            with pytest.raises(ValueError, match=says), locked(tmp_path):
                pass
        other.stdin.write("enough\n")
    assert other.returncode == 0
    with locked(tmp_path):
        assert (tmp_path / ".holder").read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(ValueError, match="is training there"), locked(tmp_path):
            pass
    assert not (tmp_path / ".holder").exists()


def test_an_adapter_of_an_earlier_step_is_said(tmp_path: Path) -> None:
    """Where the run has gone on since, and only there."""
    finished(tmp_path, load_recipe([*BASIC, "run.steps=4"]))
    adapter = tmp_path / "adapter.safetensors"
    assert later_checkpoint(adapter) is None
    for step in (2, 4):
        (tmp_path / "checkpoints" / step_name(step)).mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-000009.gone").mkdir()
    assert later_checkpoint(adapter) is None
    (tmp_path / "checkpoints" / step_name(12)).mkdir()
    said = later_checkpoint(adapter) or ""
    assert "is that of step 4; of step 12" in said
    assert said.endswith(f"adapter={tmp_path / 'checkpoints' / step_name(12)}")
    assert later_checkpoint(tmp_path / "nothing.safetensors") is None


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/mine")
    folder = folder_for(load_recipe([*BASIC, "run.out=~/runs", "run.id=x"]))
    assert folder == Path("/home/mine/runs/lora/x")
