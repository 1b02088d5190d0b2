"""What each optimiser takes, and what is refused by name: walked over the whole table."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest

from trainer.config.load import load_recipe
from trainer.config.optimiser_notes import check_optimiser
from trainer.config.optimisers import CALLED, OPTIMISERS, missing_package, unsuited
from trainer.config.run_length import laid_over
from trainer.config.schema import Recipe, RecipeError
from trainer.config.sections import OptimSpec

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
LORA = ["recipe=lora", "data.token=<v1>"]


def loaded(*words: str) -> Recipe:
    return load_recipe([*LORA, *words])


def refused(*words: str) -> str:
    with pytest.raises(RecipeError) as caught:
        loaded(*words)
    return str(caught.value)


def test_the_table_has_every_choice_and_no_other() -> None:
    assert list(OPTIMISERS) == list(get_args(OptimSpec.model_fields["name"].annotation))
    assert set(CALLED.values()) <= set(OPTIMISERS) and not set(CALLED) & set(OPTIMISERS)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_options_that_it_has_not_are_refused_by_name(name: str) -> None:
    known, own = OPTIMISERS[name], list(OPTIMISERS[name].betas) or [0.9]
    chosen = f"optim.name={name}"
    extra = [] if name != "muon" else ["methods.lora=null", "methods.full={}"]
    assert loaded(chosen, f"optim.betas={own}", *extra).optim.betas == tuple(own)
    assert loaded(chosen, "optim.weight_decay=0.05", *extra).optim.weight_decay == 0.05
    for wrong in (own[:-1], [*own, 0.9]):
        says = refused(chosen, f"optim.betas={wrong}", *extra)
        assert says.startswith(f"optim.betas={wrong}: {name} takes {len(own)} number")
        assert str(own) in says
    if known.eps:
        assert loaded(chosen, "optim.eps=1e-6", *extra).optim.eps == 1e-6
    else:
        says = refused(chosen, "optim.eps=1e-6", *extra)
        assert says.startswith("optim.eps=1e-06 has no effect") and name in says


def test_the_numbers_of_each_are_those_of_its_paper() -> None:
    betas = {name: known.betas for name, known in OPTIMISERS.items()}
    assert betas["lion"] == betas["lion8bit"] == (0.9, 0.99)
    assert betas["came"] == (0.9, 0.999, 0.9999)
    assert betas["adafactor"] == ()
    assert {betas[name] for name in ("adamw", "prodigy", "schedule_free_adamw", "muon")} == {
        (0.9, 0.999)
    }
    assert {name for name, known in OPTIMISERS.items() if known.lr != 1e-4} == {"prodigy"}


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("AdamWScheduleFree", "schedule_free_adamw"),
        ("prodigyopt", "prodigy"),
        ("Lion_8bit", "lion8bit"),
        ("AdamW_8bit", "adamw8bit"),
        ("paged_adamw_32bit", "paged_adamw32bit"),
    ],
)
def test_what_others_call_it_is_known(word: str, meant: str) -> None:
    assert refused(f"optim.name={word}").endswith(f"; did you mean {meant}?")
    assert "optim.name" in refused(f"{word.lower()}=1")


def test_prodigys_lr_is_1_and_no_rate_of_another_optimiser_is_taken_along() -> None:
    """The recipes' own rates were written for AdamW; on `tiny` they stand in `backbones`."""
    recipe = load_recipe(["recipe=custom_diffusion", "optim.name=prodigy"])
    assert (recipe.optim.lr, recipe.optim.scale_lr) == (1.0, False)
    assert recipe.tree["optim"]["lr"] == 1.0  # an adapter does not depend on our default
    assert loaded("optim.name=prodigy", "optim.lr=0.5").optim.lr == 0.5
    assert loaded("optim.name=lion").optim.lr == loaded().optim.lr == 2e-3


def test_a_file_with_another_optimiser_over_a_recipe(tmp_path: Path) -> None:
    mine, again = tmp_path / "mine.yaml", tmp_path / "again.yaml"
    mine.write_text("base: lora\noptim: {name: prodigy}\ndata: {token: <v1>}\n")
    assert load_recipe([f"recipe={mine}"]).optim.lr == 1.0
    mine.write_text("base: lora\noptim: {name: prodigy, lr: 0.7}\ndata: {token: <v1>}\n")
    again.write_text("base: ./mine.yaml\nrun: {steps: 5}\n")
    assert load_recipe([f"recipe={again}"]).optim.lr == 0.7
    assert load_recipe([f"recipe={again}", "optim.name=adamw"]).optim.lr == 1e-4


def test_rates_that_stay_where_an_optimiser_changes() -> None:
    low = {
        "optim": {
            "lr": 1e-3,
            "lrs": {"lora": 1e-3, "full": 0},
            "betas": [0.9, 0.9],
            "eps": 1e-6,
        },
        "backbones": {"tiny": {"optim": {"lr": 5e-3, "warmup": 3}}, "sd15": {"run": {"steps": 2}}},
    }
    assert laid_over(low, {"optim": {"name": "prodigy"}}) == {
        "optim": {"lrs": {"full": 0}, "betas": [0.9, 0.9], "eps": 1e-6, "name": "prodigy"},
        "backbones": {"tiny": {"optim": {"warmup": 3}}, "sd15": {"run": {"steps": 2}}},
    }
    assert laid_over(low, {"optim": {"name": "came"}})["optim"] == {
        "lr": 1e-3, "lrs": {"lora": 1e-3, "full": 0}, "name": "came",
    }  # fmt: skip
    assert laid_over(low, {"optim": {"name": "lion"}})["optim"] == {
        "lr": 1e-3, "lrs": {"lora": 1e-3, "full": 0}, "betas": [0.9, 0.9], "name": "lion",
    }  # fmt: skip
    assert low["optim"]["betas"] == [0.9, 0.9]  # as it was
    assert {name for name, known in OPTIMISERS.items() if not known.eps} == {
        "adafactor", "lion", "lion8bit", "came",
    }  # fmt: skip


def test_what_schedule_free_does_in_another_way_is_not_taken_along() -> None:
    """The recipe has a cosine and an average of its own; a given one is refused."""
    plain = load_recipe(["recipe=tiny_unet"]).optim
    optim = load_recipe(["recipe=tiny_unet", "optim.name=schedule_free_adamw"]).optim
    assert plain.schedule == "cosine" and plain.ema
    assert (optim.schedule, optim.ema) == ("constant", None)
    assert (optim.lr, optim.warmup, optim.betas) == (plain.lr, plain.warmup, plain.betas)
    assert load_recipe(["recipe=tiny_dit", "optim.name=adamw"]).optim.muon_lr is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("optim.name=prodigy", "optim.lrs={lora: 0.5}"),
            "optim.lrs={lora: 0.5}: prodigy finds one learning rate for all that trains; leave it "
            "out, or give optim.lrs.lora=1 as optim.lr is",
        ),
        (
            ("optim.name=prodigy", "optim.scale_lr=true"),
            "optim.scale_lr=true: prodigy finds the learning rate itself; give "
            "optim.scale_lr=false",
        ),
        (
            ("optim.name=schedule_free_adamw", "optim.schedule=cosine"),
            "averages weights in place of lowering the learning rate; give optim.schedule=constant",
        ),
        (
            ("optim.name=schedule_free_adamw", "optim.ema=0.9"),
            "optim.ema=0.9: schedule_free_adamw averages the weights itself; give optim.ema=null",
        ),
        (
            ("optim.name=schedule_free_adamw", "optim.betas=[0, 0.9]"),
            "optim.betas=[0.0, 0.9]: the first weighs schedule_free_adamw's average, and must be "
            "above 0",
        ),
    ],
)
def test_what_an_optimiser_cannot_have(words: tuple[str, ...], says: str) -> None:
    assert refused(*words).endswith(says)


def test_what_prodigy_and_schedule_free_do_take() -> None:
    one = loaded("optim.name=prodigy", "optim.lrs={lora: 1}", "optim.schedule=cosine")
    assert one.optim.lrs == {"lora": 1.0}
    values = {"betas": None, "lr": 1.0, "scale_lr": False, "lrs": {"full": 0}}
    assert unsuited("prodigy", values) is None
    other = loaded("optim.name=schedule_free_adamw", "optim.warmup=5")
    assert other.optim.warmup == 5


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"name": "prodigy", "lr": 1.0}, "finds the learning rate itself"),
        ({"name": "prodigy", "lr": 0.1}, "finds the learning rate itself"),
        (
            {"name": "prodigy", "lr": 0.09},
            "optim.lr=0.09: prodigy finds .* multiplies it by this; 1 is usual",
        ),
        ({"name": "lion"}, "a third to a tenth of AdamW's .* 3 to 10 times .*optim.lr=0.0001"),
        ({"name": "adafactor"}, r"neither .* relative .* no momentum, optim\.betas=\[0\.9\] keeps"),
        ({"name": "schedule_free_adamw"}, "the adapter have the average"),
    ],
)
def test_what_is_said_at_the_start(values: dict[str, Any], says: str) -> None:
    (line,) = check_optimiser(OptimSpec(**values))
    import re

    assert re.search(says, line)
    recipe = loaded(*(f"optim.{key}={value}" for key, value in values.items()))
    assert sum("optim." in each for each in recipe.said) == 1


def test_nothing_is_said_of_the_others() -> None:
    assert not any(check_optimiser(OptimSpec(name=name)) for name in ("adamw", "came"))
    (line,) = check_optimiser(OptimSpec(name="adafactor", betas=(0.9,)))
    assert line.endswith("; momentum")


@pytest.mark.parametrize("name", [name for name, known in OPTIMISERS.items() if known.package])
def test_a_package_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the line that mends it, and that line installs the package."""
    known = OPTIMISERS[name]
    extras = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (wanted,) = extras[known.extra]
    package = wanted.partition(">=")[0].replace("-", "_")
    assert package == known.package
    assert missing_package(name) is None
    monkeypatch.setitem(sys.modules, known.package, None)
    says = f"optim.name={name} needs {package}; pip install 'attention-trainer[{known.extra}]'"
    assert refused(f"optim.name={name}") == says


def test_qlora_pages_32_bit_moments_as_its_paper_but_for_the_small_backbone() -> None:
    """arXiv 2305.14314, section 3: the authors' default optimiser is paged AdamW in 32 bits."""
    photos = ["recipe=qlora", "data.concept=sprite:fox", "data.class_word=animal"]
    assert load_recipe([*photos, "backbone=sd15"]).optim.name == "paged_adamw32bit"
    for small in ("tiny", "tiny_dit"):
        assert load_recipe([*photos, f"backbone={small}"]).optim.name == "adamw8bit"
