"""`run.epochs` beside `run.steps`: exactly one, and the steps that epochs take."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """lora_folder on 3 photos that count 10 times and 2 that count 3 times."""
    for name, count in (("10_dog", 3), ("3_cat", 2)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (32, 32)).save(tmp_path / name / f"{number}.png")
    return ["recipe=lora_folder", f"data.folder={tmp_path}"]


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        (["run.epochs=1"], 9),  # 36 samples, 4 at once
        (["run.epochs=3", "run.batch_size=8"], 14),  # 13.5
        (["run.epochs=0.5"], 5),
        (["run.epochs=2", "run.accumulate=2"], 9),
        (["run.epochs=1", "data.repeats=2"], 18),
        (["run.epochs=1", "data.validation=3"], 2),  # the last three are dogs: 6 samples are left
        (["run.epochs=0.001"], 1),
    ],
)
def test_epochs_become_steps(words: list[str], more: list[str], steps: int) -> None:
    recipe = load_recipe([*words, *more, "optim.warmup=0"])
    assert recipe.run.steps == steps == recipe.tree["run"]["steps"]
    assert "epochs" not in recipe.tree["run"]
    assert any(line.endswith(f"so run.steps={steps}") for line in recipe.said)


def test_one_of_both_is_given(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"run\.epochs=2 and run\.steps=9 both say how long"):
        load_recipe([*words, "run.epochs=2", "run.steps=9"])
    with pytest.raises(RecipeError, match=r"run\.epochs=0: "):
        load_recipe([*words, "run.epochs=0"])
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"base": "lora_folder", "run": {"epochs": 2}}))
    own = [f"recipe={mine}", words[1], "optim.warmup=0"]
    assert load_recipe(own).run.steps == 18  # its base says 1500 steps
    assert load_recipe([*own, "run.steps=7"]).run.steps == 7
    assert load_recipe([*own, "run.epochs=1"]).run.steps == 9


def test_a_warm_up_longer_than_the_epochs_is_refused(words: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"optim\.warmup=60 has no effect: the run has 9 steps"):
        load_recipe([*words, "run.epochs=1", "optim.warmup=60"])


def test_data_that_cannot_be_counted_are_refused() -> None:
    assert load_recipe(["recipe=linear_swap", "data.count=160", "run.epochs=2"]).run.steps == 20
    with pytest.raises(RecipeError, match=r"run\.epochs=2: this data source does not know how"):
        load_recipe(["recipe=animatediff", "run.epochs=2"])
    with pytest.raises(RecipeError, match=r"run\.epochs: concepts learned in a row"):
        load_recipe(["recipe=c_lora", "run.epochs=2"])
