"""The runs of a sweep: `optim.lr=[1e-4,3e-4] methods.lora.rank=[4,16]` is four of them, one for
each choice of a value of each key.

A list in brackets is swept where the key takes no list; of a key that takes one, as
`preview.prompts`, it is one value, and a list of lists is swept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from trainer.config.load import load_recipe
from trainer.config.overrides import parse_words
from trainer.config.schema import Recipe, RecipeError

MOST = 1000  # runs of a sweep
LONG = 80  # letters of a folder's name


@dataclass(frozen=True)
class Case:
    """One run of a sweep. name: of its folder; values: of the swept keys; words: the same, as they
    are given to `fit`; recipe: with them."""

    name: str
    values: dict[str, Any]
    words: tuple[str, ...]
    recipe: Recipe


def cases_of(words: Sequence[str]) -> list[Case]:
    """Every run of a sweep, the values of the last key changing fastest.

    Raises:
        RecipeError: no key has several values, there are too many runs, or one of them is wrong.
    """
    named = {word.partition("=")[0] for word in words}
    if given := sorted(named & {"run", "run.id"}):
        raise RecipeError(
            f"{given[0]} names one run folder, and a sweep has several, in the folder that sweep= "
            "names; leave it out"
        )
    swept = _swept(words)
    if not swept:
        raise RecipeError("no key has several values; give some, as in optim.lr=[1e-4,3e-4]")
    for key, values in swept.items():
        texts = [json.dumps(value) for value in values]
        if twice := next((text for text in texts if texts.count(text) > 1), None):
            raise RecipeError(f"{key}: {twice} is given twice; give each value once")
    choices = list(product(*swept.values()))
    if len(choices) > MOST:
        raise RecipeError(f"these are {len(choices)} runs, more than {MOST}; give fewer values")
    fixed = [word for word in words if word.partition("=")[0] not in swept]
    return [_case(fixed, dict(zip(swept, choice, strict=True))) for choice in choices]


def sweep_folder(cases: Sequence[Case]) -> Path:
    """Where the runs of a sweep are, unless sweep= says it: the same for the same words, so that
    the command given again goes on with them, on any number of devices."""
    first = cases[0].recipe
    trees = [_without_counts(case.recipe.tree) for case in cases]
    known = json.dumps(trees, sort_keys=True, default=str)
    digest = hashlib.sha256(known.encode()).hexdigest()[:8]
    return first.run.out.expanduser() / f"sweep-{Path(first.name).stem}-{digest}"


def _without_counts(tree: dict[str, Any]) -> dict[str, Any]:
    run = {k: v for k, v in (tree.get("run") or {}).items() if k not in ("devices", "nodes")}
    return {**tree, "run": run}


def _swept(words: Sequence[str]) -> dict[str, list[Any]]:
    """The keys with several values. A list that the recipe takes as it is, is one value."""
    tree = {word: parse_words([word]) for word in words}
    lists = {word: value for word in words if isinstance(value := _leaf(tree[word]), list)}
    fixed = [word for word in words if word not in lists]
    found: dict[str, list[Any]] = {}
    other: RecipeError | None = None
    for word, value in lists.items():
        key = word.partition("=")[0]
        try:
            load_recipe([*fixed, word])
        except RecipeError as error:
            if key not in str(error):
                other = error
            elif not value or any(_takes(fixed, key, each) for each in value):
                found[key] = value
            else:  # a key that takes a list, and one of its values is wrong
                raise
    if other is not None and not found:
        raise other
    if empty := next((key for key, value in found.items() if not value), None):
        raise RecipeError(f"{empty}=[] has no value to train with; give some, as in [1, 2]")
    return found


def _takes(fixed: Sequence[str], key: str, value: Any) -> bool:
    """Whether a key takes a value alone."""
    try:
        load_recipe([*fixed, _word(key, value)])
    except RecipeError as error:
        return key not in str(error)
    return True


def _leaf(tree: Any) -> Any:
    """The value of the one word that a tree was made of; a mapping was given as a whole section."""
    while isinstance(tree, dict) and len(tree) == 1:
        (tree,) = tree.values()
    return tree


def _case(fixed: Sequence[str], values: dict[str, Any]) -> Case:
    words = tuple(_word(key, value) for key, value in values.items())
    return Case(_name(values), values, words=words, recipe=load_recipe([*fixed, *words]))


def _word(key: str, value: Any) -> str:
    """`key=value` that is read as this value again; a text is quoted where it must be."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if _leaf(parse_words([f"{key}={text}"])) == value:
        return f"{key}={text}"
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _name(values: dict[str, Any]) -> str:
    """lr_0.0001-rank_4"""
    texts = [
        f"{key.rpartition('.')[2]}_{value if isinstance(value, str) else json.dumps(value)}"
        for key, value in values.items()
    ]
    plain = "-".join(texts)
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("_")
    if name == plain and len(name) <= LONG:
        return name
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:6]
    return f"{name[:LONG]}-{digest}"
