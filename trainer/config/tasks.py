"""A continual recipe as ordinary recipes, one a concept: what each lays over the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.config.schema import Recipe, RecipeError
from trainer.config.sections import ContinualSpec
from trainer.methods.method import Method


def check_tasks(whole: Recipe) -> None:
    """Raises `RecipeError` where a recipe with `continual.concepts` cannot be run one by one."""
    if not isinstance(getattr(whole.data, "token", None), str):
        raise RecipeError(
            "continual.concepts needs data.source=concept with one data.token, in whose place the "
            "token of each concept stands"
        )
    if whole.run.devices * whole.run.nodes > 1:
        raise RecipeError("continual.concepts are learned on one device; set run.devices=1")
    if whole.continual.images and not whole.evaluate.alone:
        raise RecipeError(
            "evaluate.alone is empty, so no concept can be judged; give prompts, or "
            "continual.images=0"
        )


def task_overlay(whole: Recipe, number: int) -> dict[str, Any]:
    """What makes the recipe of concept `number`: its data and token, prompts that name that token,
    and for every method that counts tasks, which one this is."""
    spec = whole.continual
    old, token = str(getattr(whole.data, "token", "")), spec.words[number]

    def named(prompts: Sequence[str]) -> list[str]:
        return [prompt.replace(old, token) for prompt in prompts]

    data = {"concept": spec.concepts[number], "token": token}
    if spec.class_words:
        data["class_word"] = spec.class_words[number]
    look, asked = whole.preview, whole.evaluate
    return {
        "continual": None,
        "data": data,
        "methods": {name: _options(each, spec, number) for name, each in whole.methods.items()},
        "preview": {
            "prompts": named(look.prompts),
            "maps": look.maps and look.maps.replace(old, token),
        },
        "evaluate": {"alone": named(asked.alone), "beside": named(asked.beside)},
    }


def _options(method: Method, spec: ContinualSpec, number: int) -> dict[str, Any]:
    known = type(method).model_fields
    options: dict[str, Any] = {"task": number, "num_tasks": len(spec.concepts)}
    if "tokens" in known:
        options["tokens"] = list(spec.words)
        if spec.inits:
            options["init"] = list(spec.inits)
    return {name: value for name, value in options.items() if name in known}
