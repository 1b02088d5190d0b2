"""Recipes: what resolves to what, and every mistake as one message with its key and the mend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from trainer import recipe
from trainer.recipe import RecipeError, backbone_names, merge, parse, recipe_names

CUSTOM = "recipe=custom_diffusion"
SMALL: dict[str, Any] = {"data": {"source": "world", "count": 8}, "methods": {"selective": {}}}


def refusal(*words: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.load(words)
    return str(caught.value)


def write(folder: Path, tree: dict[str, Any] | str) -> str:
    """The word that names a recipe file of the user's own."""
    path = folder / "mine.yaml"
    text = tree if isinstance(tree, str) else yaml.safe_dump(tree)
    path.write_text(text, encoding="utf-8")
    return f"recipe={path}"


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_resolves(name: str) -> None:
    loaded = recipe.load([f"recipe={name}"])
    assert loaded.name == name
    assert loaded.methods
    assert loaded.backbone_name in backbone_names()
    assert "backbones" not in loaded.tree
    again = recipe.resolve(name, loaded.tree, {})  # what an adapter carries is a recipe
    assert again == loaded


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_public_backbones_are_pinned(name: str) -> None:
    spec = recipe.backbone_spec(name)
    assert spec.folder is None
    assert spec.revision is not None
    assert len(spec.revision) == 40


# fmt: off
MISTAKES = {
    "recipe": ("recipe=custom_difusion", "recipe=custom_difusion: no such recipe; did you mean custom_diffusion?"),  # noqa: E501
    "recipe-file": ("recipe=./custom_diffusion.yml", "recipe=./custom_diffusion.yml: no such file; did you mean custom_diffusion?"),  # noqa: E501
}
# fmt: on
