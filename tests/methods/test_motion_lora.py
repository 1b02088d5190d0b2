"""MotionLoRA, the recipe: after real, short training of motion modules, LoRA on their attention
learns from clips of one motion, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.common.exit_codes import BAD_RECIPE
from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError
from trainer.data.source import Needs
from trainer.runs.adapter import load_adapted

CLIP = Path(__file__).parents[2] / "data" / "tiny" / "clip"
SMALL = [
    "methods.animatediff.heads=2",
    "data.frames=3",
    "data.count=3",
    "data.validation=2",
    "run.steps=2",
    "run.batch_size=1",
    "run.precision=fp32",
    "run.validate_every=0",
    "run.checkpoint_every=0",
    "preview.every=0",
    "preview.steps=2",
    "tracker=none",
]


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    run = tmp_path_factory.mktemp("motion") / "modules"
    words = ["recipe=animatediff", *SMALL, f"backbone={tiny_folder}", f"run={run}"]
    assert main(["fit", *words]) == 0
    return run


@pytest.fixture(scope="module")
def run(modules: Path, tiny_folder: Path) -> Path:
    folder = modules.parent / "lora"
    words = ["recipe=motion_lora", *SMALL, f"backbone={tiny_folder}", f"run={folder}"]
    assert main(["fit", *words, f"methods.animatediff.weights={modules}"]) == 0
    return folder


def test_its_clips_are_of_one_motion(tmp_path: Path) -> None:
    data = load_recipe(["recipe=motion_lora"]).data

    def none(*_: object) -> list[object]:
        return []

    both = data.open(Needs(64, 4, none, tmp_path, lambda: ""))  # type: ignore[arg-type]
    for clips in both:
        assert clips is not None
        told = [clips.caption(i, None) for i in range(len(clips))]  # type: ignore[arg-type]
        assert all("moving left" in caption for caption in told)
    assert len(both[0]) == 50


def test_it_trains_lora_on_temporal_attention_alone(run: Path, modules: Path) -> None:
    stored = load_file(run / "adapter.safetensors")
    assert stored
    assert all(".motion_modules." in name and ".lora_" in name for name in stored)
    assert all(bool(value.any()) for value in stored.values())  # B left its start, zero
    model, _ = load_adapted(run / "adapter.safetensors")
    own = {
        name.replace(".base_layer", ""): value
        for name, value in model.named_parameters()
        if ".lora_" not in name
    }
    learned = {
        n: v for n, v in load_file(modules / "adapter.safetensors").items() if "lora" not in n
    }
    assert learned
    for name, value in learned.items():
        assert torch.equal(own[name], value), name


def test_it_is_painted_with_and_judged(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"adapter={run}", "prompt=a fox", f"out={tmp_path}"]
    assert main(["sample", *words]) == 0
    assert (tmp_path / "a-fox-0.gif").is_file()
    assert main(["evaluate", f"run={run}", f"judge={CLIP}", "images=3"]) == 0
    assert "direction right" in capsys.readouterr().out
    table = json.loads((run / "evaluation.json").read_text())
    assert set(table.pop("pictures")) >= {"direction right", "object right"}
    assert set(table) == {"base", "adapted", "real"}
    assert table["base"].keys() == table["adapted"].keys() == table["real"].keys()
    for line in ("direction right", "object right", "frame consistency"):
        assert all(0 <= table[name][line] <= 1 for name in table)
    assert table["real"]["validation loss"] is None
    assert table["base"]["frame consistency"] != table["adapted"]["frame consistency"]
    assert table["base"]["validation loss"] != table["adapted"]["validation loss"]


def test_without_trained_modules_it_says_what_is_needed(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["recipe=motion_lora", *SMALL, f"backbone={tiny_folder}", "run=here"]
    mine = "methods.animatediff.weights=runs/animatediff/mine"
    assert main(["fit", *words, mine]) == BAD_RECIPE
    said = capsys.readouterr().err
    assert "methods.animatediff: weights=runs/animatediff/mine: no such file" in said


def test_a_motion_that_the_world_has_not_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"data\.motion='leftwards': choose one of moving up, "):
        load_recipe(["recipe=motion_lora", "data.motion=leftwards"])
