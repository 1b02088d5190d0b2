"""A continual recipe as ordinary recipes, one for each concept: what differs between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.config.schema import Recipe, RecipeError
from trainer.config.sections import ContinualSpec
from trainer.methods.method import Method


def check_tasks(recipe: Recipe) -> None:
    """Raises `RecipeError` where a recipe with `continual.concepts` cannot be run one by one."""
    if not isinstance(getattr(recipe.data, "token", None), str):
        raise RecipeError(
            "continual.concepts needs data.source=concept with one data.token, which the token of "
            "each concept replaces"
        )
    if recipe.run.devices * recipe.run.nodes > 1:
        raise RecipeError("continual.concepts are learned on one device; set run.devices=1")
    if recipe.continual.images and not recipe.evaluate.alone:
        raise RecipeError(
            "evaluate.alone is empty, so no concept can be judged; give prompts, or "
            "continual.images=0"
        )


def task_overlay(recipe: Recipe, number: int) -> dict[str, Any]:
    """What makes the recipe of concept `number`: its data and token, prompts that name that token,
    and for every method that counts tasks, which one this is."""
    spec = recipe.continual
    old, token = str(getattr(recipe.data, "token", "")), spec.words[number]

    def named(prompts: Sequence[str]) -> list[str]:
        return [prompt.replace(old, token) for prompt in prompts]

    data = {"concept": spec.concepts[number], "token": token}
    if spec.class_words:
        data["class_word"] = spec.class_words[number]
    previews, asked = (recipe.tree.get(key) or {} for key in ("preview", "evaluate"))
    return {
        "continual": None,
        "data": data,
        "methods": {name: _options(each, spec, number) for name, each in recipe.methods.items()},
        "preview": {
            key: named(value) if key == "prompts" else value and value.replace(old, token)
            for key, value in previews.items()
            if key in ("prompts", "maps")
        },
        "evaluate": {key: named(asked[key]) for key in ("alone", "beside") if key in asked},
    }


def _options(method: Method, spec: ContinualSpec, number: int) -> dict[str, Any]:
    known = type(method).model_fields
    options: dict[str, Any] = {"task": number, "num_tasks": len(spec.concepts)}
    if "tokens" in known:
        options["tokens"] = list(spec.words)
        if spec.inits:
            options["init"] = list(spec.inits)
    return {name: value for name, value in options.items() if name in known}
