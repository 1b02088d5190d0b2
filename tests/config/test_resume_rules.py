"""What every key of a recipe does on resuming: declared in one table, and done as it says."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.config.load import load_recipe
from trainer.config.resume_rules import (
    APPLIED,
    FREE,
    IN_DATA,
    IN_SECTIONS,
    OUTSIDE,
    PLACE,
    REFUSED,
    SWITCH,
    Change,
    changed_keys,
    rule_of,
)
from trainer.config.schema import KEYS, SECTIONS, Recipe
from trainer.data.source import Source
from trainer.methods.apply import find_method, method_names
from trainer.runs.resume_check import check_data, check_model, check_recipe

FOLDER = Path("runs/lora/one")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(["recipe=lora", "data.token=<v1>", "run.steps=10"])


def keys() -> Iterator[tuple[str, str, str]]:
    """Every key there is: its section, or the source or method whose it is, and its name."""
    for section, cls in SECTIONS.items():
        for name in cls.model_fields:
            yield section, "", name
    for source in Source.names():
        for name in Source.find(source).model_fields:
            yield "data", source, name
    for method in method_names():
        for name in find_method(method).model_fields:
            yield "methods", method, name


def trees(section: str, own: str, name: str, base: dict[str, Any]) -> tuple[Any, Any, str]:
    """A stored tree and this run's, which differ in one key; and that key in full."""
    now = deepcopy(base)
    if section == "data":
        now["data"] = {"source": own}
    elif section == "methods":
        now["methods"] = {own: {}}
    before = deepcopy(now)
    values = before.setdefault(section, {})
    inner = values[own] if section == "methods" else values
    inner[name] = {"another": 3} if f"{section}.{name}" == "optim.lrs" else "of another kind"
    if section == "methods":
        return before, now, f"methods.{own}.{name}"
    if f"{section}.{name}" == "optim.lrs":  # rates of methods that the recipe has
        inner[name] = {"lora": 1e-3}
    if f"{section}.{name}" == "optim.ema":  # neither of them is off
        inner[name], now["optim"] = 0.5, {**now["optim"], "ema": 0.9}
    return before, now, f"{section}.{name}"


@pytest.mark.parametrize(
    ("section", "own", "name"),
    [pytest.param(*key, id=".".join(filter(None, key))) for key in keys()],
)
def test_each_key_is_applied_refused_or_free(
    section: str, own: str, name: str, recipe: Recipe
) -> None:
    before, now, key = trees(section, own, name, recipe.tree)
    if section in IN_SECTIONS:
        assert name in IN_SECTIONS[section], f"{key}: declare it in resume_rules.py"
    run, manifest = replace(recipe, tree=now), {"recipe": before, "step": 4, "micro_step": 4}
    (change,) = changed_keys(before, run)
    assert change.key == key and change.rule == rule_of(key, own)
    if change.settled == REFUSED:
        with pytest.raises(ValueError, match=rf"begun with {key}=.*choose another run\.id"):
            check_recipe(FOLDER, manifest, run)
    else:
        said = [each.key for each in check_recipe(FOLDER, manifest, run)]
        assert said == ([key] if change.settled == APPLIED else [])


# what decides the batches, the noise, the start or the arithmetic of the steps already done
DECIDED = """
objective.target objective.path optim.name run.batch_size run.accumulate run.seed run.resolution
run.precision text.max_tokens continual.concepts continual.tokens continual.class_words
continual.inits continual.images continual.judge
"""
# what a step to come may do otherwise than those before it
LATER = """
objective.timesteps objective.logit_mean objective.logit_std objective.weighting
objective.shift objective.min_snr_gamma objective.offset_noise objective.caption_dropout optim.lr
optim.muon_lr optim.scale_lr optim.betas optim.eps optim.weight_decay optim.warmup optim.schedule
optim.final_lr optim.clip run.steps run.on_nonfinite run.nonfinite_in_a_row run.nonfinite_total
"""


def test_what_decides_the_numbers_is_never_free() -> None:
    """Written down here apart from the table, so that a rule that is exchanged is noticed."""
    assert {rule_of(key) for key in DECIDED.split()} == {REFUSED}
    assert {rule_of(key) for key in LATER.split()} == {APPLIED}
    assert {rule_of(key) for key in ("optim.ema", "optim.lrs")} == {SWITCH}
    rules = {
        f"{section}.{key}": rule
        for section, own in IN_SECTIONS.items()
        for key, rule in own.items()
    }
    free = {key for key, rule in rules.items() if rule == FREE}
    assert {key.partition(".")[0] for key in free} == {"run", "preview", "evaluate"}
    for key in ("flip", "augment", "prior_weight", "prior_steps", "token", "validation"):
        assert rule_of(f"data.{key}", "concept") == REFUSED
    assert rule_of("methods.lora.rank") == rule_of("backbone") == REFUSED


def test_the_table_names_no_key_that_is_not_there() -> None:
    assert {name: set(rules) for name, rules in IN_SECTIONS.items()} == {
        name: set(cls.model_fields) for name, cls in SECTIONS.items()
    }
    for source, rules in IN_DATA.items():
        assert set(rules) <= set(Source.find(source).model_fields)
        assert {rules[key] for key in rules if key.endswith("_tags")} <= {APPLIED}
        assert set(rules.values()) <= {FREE, PLACE, APPLIED, REFUSED}
    assert {*OUTSIDE, *SECTIONS, "data", "methods"} == set(KEYS)


def test_what_it_does_not_know_is_refused(recipe: Recipe) -> None:
    """An option of a new method or source, of another version, a method more or less."""
    assert rule_of("methods.new.option") == rule_of("data.option", "new") == REFUSED
    assert rule_of("run.new") == rule_of("new") == REFUSED
    later = deepcopy(recipe.tree)
    later["run"]["of_another_version"] = 3
    later["methods"]["flash"] = {}
    changes = changed_keys(later, recipe)
    assert {change.key for change in changes} == {"run.of_another_version", "methods.flash"}
    assert {change.settled for change in changes} == {REFUSED}


def test_a_default_written_out_is_no_difference(recipe: Recipe) -> None:
    stored = deepcopy(recipe.tree)
    stored["optim"] |= {"betas": [0.9, 0.999], "eps": "1e-8", "clip": 1}
    stored["run"] |= {"accumulate": 1, "log_every": 10}
    stored["methods"]["selective"] = None
    assert changed_keys(stored, recipe) == []


def test_turned_on_or_off_is_refused_and_another_value_applied() -> None:
    cases = [
        (0.9, 0.99, APPLIED),
        (0.9, None, REFUSED),
        (None, 0.9, REFUSED),
        ({"lora": 1e-3}, {"lora": 1e-4}, APPLIED),
        ({}, {"lora": 1e-4}, APPLIED),
        ({}, {"lora": 0.0}, REFUSED),
        ({"lora": 0.0, "dora": 1.0}, {"lora": 1.0, "dora": 0.0}, REFUSED),
    ]
    for before, now, rule in cases:
        assert Change("optim.ema", before, now, rule=SWITCH).settled == rule, (before, now)


def test_steps_below_the_checkpoint_and_batches_counted_otherwise(recipe: Recipe) -> None:
    stored = {"recipe": recipe.tree, "step": 11, "micro_step": 11}
    with pytest.raises(ValueError, match=r"run\.steps=10 is below step 11, which the run in .*one"):
        check_recipe(FOLDER, stored, recipe)
    with pytest.raises(ValueError, match=r"trained 8 batches in 4 steps, which run\.accumulate=1"):
        check_recipe(FOLDER, {**stored, "step": 4, "micro_step": 8}, recipe)
    assert check_recipe(FOLDER, {**stored, "step": 10, "micro_step": 10}, recipe) == []


def test_another_backbone_and_another_precision(recipe: Recipe) -> None:
    own = {"name": "tiny", "unet": "1", "adapters": "2"}
    stored = {"backbone": own, "precision": "bf16"}
    check_model(FOLDER, stored, {**own, "name": "moved"}, "bf16")
    check_model(FOLDER, {}, own, "fp32")  # of an earlier version
    with pytest.raises(ValueError, match="begun on a backbone with adapters 2, and that of tiny"):
        check_model(FOLDER, stored, {**own, "adapters": "3"}, "bf16")
    with pytest.raises(ValueError, match=r"begun in bf16.*give run\.precision=bf16"):
        check_model(FOLDER, stored, own, "fp32")


def test_changed_data_are_named_with_the_place_that_changed(recipe: Recipe) -> None:
    stored = deepcopy(recipe.tree)
    stored["data"]["concept"] = "./dog"
    manifest = {"recipe": stored, "step": 4, "data": {"0.jpg": "a b", "1.jpg": "c d"}}
    check_data(FOLDER, manifest, recipe, {"0.jpg": "a b", "1.jpg": "c d"})
    with pytest.raises(ValueError, match=r"data\.concept=\./dog \(now .*: 1\.jpg was rewritten, "):
        check_data(FOLDER, manifest, recipe, {"1.jpg": "e d", "2.jpg": "a b"})
    many = {f"{number}.jpg": "a b" for number in range(100)}
    with pytest.raises(ValueError, match=r"7\.jpg is new and 92 more; put back"):
        check_data(FOLDER, {**manifest, "data": {}}, recipe, many)
