"""A resolved recipe as plain values by full key, as trackers list hyperparameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trainer.config.partners import flat
from trainer.config.schema import SECTIONS, Recipe

Plain = str | int | float | bool


def flat_settings(recipe: Recipe) -> dict[str, Plain]:
    """Every option by its full key, as in `optim.lr`, those at their defaults too. What is not a
    number, a text, true or false is JSON, as in [1, 2] and null."""
    tree: dict[str, Any] = {
        "recipe": recipe.name,
        "backbone": recipe.backbone_name,
        "data": {"source": recipe.tree["data"]["source"], **recipe.data.model_dump(mode="json")},
        "methods": {name: own.model_dump(mode="json") for name, own in recipe.methods.items()},
        **{name: getattr(recipe, name).model_dump(mode="json") for name in SECTIONS},
    }
    return {
        key: value if isinstance(value, Plain) else json.dumps(value, ensure_ascii=False)
        for key, value in flat(tree)
        if not (isinstance(value, Mapping) and value)  # its parts are listed
    }
