"""A recipe beside an imported adapter that trains on from it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trainer.common.atomic import written_atomically
from trainer.config.load import read_recipe

BASE = "lora"  # data, optimiser and previews are this recipe's


def write_recipe(path: Path, adapter: Path, tree: Mapping[str, Any]) -> None:
    """Writes the recipe; methods of the base recipe that the adapter has not are removed in it."""
    methods = dict.fromkeys(read_recipe(BASE)["methods"]) | dict(tree["methods"])
    own = {
        "base": BASE,
        "backbone": tree["backbone"],
        "methods": methods,
        "run": {"start_from": str(adapter.resolve())},
    }
    words = methods.get("new_token") or {"tokens": ["sks"]}
    own["data"] = {"token": words["tokens"][0]}
    text = yaml.safe_dump(own, sort_keys=False, allow_unicode=True, width=100)
    head = (
        f"# Trains on from {adapter.name}, which was imported; data and optimiser are those of "
        f"recipe={BASE}.\n#\n#     python -m trainer fit {shlex.quote(f'recipe={path}')} "
        "data.concept=./my_photos data.class_word=dog\n"
    )
    with written_atomically(path) as part:
        part.write_text(head + text, encoding="utf-8")
