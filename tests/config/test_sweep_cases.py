"""Which runs the words of a sweep are."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config.schema import RecipeError
from trainer.config.sweep_cases import cases_of, sweep_folder

RECIPE = "recipe=tiny_unet"


def test_every_choice_of_values_is_a_run_the_last_key_fastest() -> None:
    cases = cases_of([RECIPE, "optim.lr=[1e-4,3e-4]", "run.seed=[4,16]", "run.steps=7"])
    assert [(case.recipe.optim.lr, case.recipe.run.seed) for case in cases] == [
        (1e-4, 4), (1e-4, 16), (3e-4, 4), (3e-4, 16),
    ]  # fmt: skip
    assert {case.recipe.run.steps for case in cases} == {7}
    assert cases[1].words == ("optim.lr=0.0001", "run.seed=16")
    assert cases[1].name == "lr_0.0001-seed_16"


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("optim.lr=[1e-05,2.5]", ["optim.lr=1e-05", "optim.lr=2.5"]),
        (
            "optim.betas=[[0.9,0.99],[0.5,0.9]]",
            ["optim.betas=[0.9, 0.99]", "optim.betas=[0.5, 0.9]"],
        ),
        ("optim.ema=[null,0.9]", ["optim.ema=null", "optim.ema=0.9"]),
        ("run.channels_last=[true,false]", ["run.channels_last=true", "run.channels_last=false"]),
        ("backbone=[tiny,tiny_dit]", ["backbone=tiny", "backbone=tiny_dit"]),
        ("recipe=[tiny_unet,lora]", ["recipe=tiny_unet", "recipe=lora"]),
        ("methods.full=[{},null]", None),
    ],
)
def test_the_words_of_a_run_have_its_values(word: str, words: list[str] | None) -> None:
    given = [word] if word.startswith("recipe=") else [RECIPE, word]
    if words is None:  # without its method nothing would train, which is the error of that run
        with pytest.raises(RecipeError, match="nothing would train"):
            cases_of(given)
        return
    assert [case.words for case in cases_of(given)] == [(each,) for each in words]


def test_a_wrong_value_in_a_list_that_the_recipe_takes_is_named() -> None:
    """And not that a list is needed: one was given."""
    with pytest.raises(RecipeError, match="<b> is no word of this model"):
        cases_of([RECIPE, "preview.prompts=[a <b> fox]", "run.seed=[1,2]"])
    with pytest.raises(RecipeError, match=r"run\.steps='x': a whole number is needed"):
        cases_of([RECIPE, "run.steps=[x,2]"])


def test_a_list_that_the_recipe_takes_is_one_value() -> None:
    prompts = "preview.prompts=[a fox, a cat]"
    cases = cases_of([RECIPE, prompts, "optim.betas=[0.9,0.95]", "run.seed=[1,2]"])
    assert [case.values for case in cases] == [{"run.seed": 1}, {"run.seed": 2}]
    assert cases[0].recipe.preview.prompts == ("a fox", "a cat")


def test_names_of_folders_are_different_and_plain() -> None:
    texts = ["a/b", "a_b", "x" * 200, "x" * 201]
    cases = cases_of([RECIPE, f"preview.negative=[{','.join(texts)}]"])
    names = [case.name for case in cases]
    assert len(set(names)) == 4 and all(len(name) < 100 and "/" not in name for name in names)


def test_the_same_words_have_the_same_folder_on_any_number_of_devices() -> None:
    words = [RECIPE, "run.seed=[1,2]", "run.out=there"]
    own = sweep_folder(cases_of(words))
    assert own.parent == Path("there") and own.name.startswith("sweep-tiny_unet-")
    assert sweep_folder(cases_of([*words, "run.devices=2", "run.nodes=2"])) == own
    assert sweep_folder(cases_of([*words, "run.steps=9"])) != own


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["run.steps=3"], "no key has several values; give some, as in optim.lr="),
        (["run.seed=[]"], "run.seed=[] has no value to train with"),
        (["run.seed=[1,2,1]"], "run.seed: 1 is given twice; give each value once"),
        (["optim.lr=[1e-4,fast]"], "optim.lr='fast': a number is needed"),
        (["optim.lrr=[1,2]"], "optim.lrr: no such key"),
        (["run.seed=[1,2]", "run.id=a"], "run.id names one run folder, and a sweep has several"),
        (["run.seed=[1,2]", "run=a"], "run names one run folder"),
        ([f"run.seed={list(range(40))}", f"run.steps={list(range(1, 41))}"], "these are 1600 runs"),
    ],
)
def test_what_is_no_sweep_is_refused(words: list[str], why: str) -> None:
    with pytest.raises(RecipeError) as refused:
        cases_of([RECIPE, *words])
    assert why in str(refused.value)
