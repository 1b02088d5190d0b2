"""Options that have no effect because another one, their partner, is not as they need it: each that
a user has given is refused, by name and with what it needs.

An option knows the partners in its own record (`idle` of a section, a method, a data source); those
in other records are here. What a shipped recipe or a default says is never refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from trainer.backbones.families import find_family
from trainer.config.schema import SECTIONS, Recipe, RecipeError
from trainer.data.source import Source
from trainer.methods.method import Method

PICTURES = "it guides the frames of clips, and this run has pictures"


def check_partners(recipe: Recipe, parts: Iterable[Recipe], given: Mapping[str, Any]) -> None:
    """Raises RecipeError for an option that has no effect. parts: the recipes of single runs that a
    continual recipe consists of, or the recipe alone; given: what a user has given, as a tree."""
    refuse_idle(idle_options(recipe, list(parts)), given)


def refuse_idle(idle: Mapping[str, str], given: Mapping[str, Any]) -> None:
    """Raises RecipeError for a given option that is idle, unless its value asks for nothing."""
    for key, value in flat(given):
        if key in idle and value:
            raise RecipeError(f"{key}={value} has no effect: {idle[key]}")


def idle_options(recipe: Recipe, parts: list[Recipe]) -> dict[str, str]:
    """Every option of a recipe that has no effect, by its full key, and what it would need."""
    last = parts[-1]
    found = {
        f"{name}.{key}": why
        for name in SECTIONS
        for key, why in getattr(last if name != "continual" else recipe, name).idle().items()
    }
    found |= {f"data.{key}": why for key, why in last.data.idle().items()}
    found |= idle_of_methods(last.methods)
    rules: tuple[Callable[[Recipe], Mapping[str, str]], ...] = (
        _of_optim, _of_run, _of_preview, _of_evaluate, _of_tasks,
    )  # fmt: skip
    for rule in rules:
        found |= rule(recipe)
    return found


def idle_of_methods(methods: Mapping[str, Method]) -> dict[str, str]:
    """The options of methods that have no effect beside their others, by their full keys."""
    return {
        f"methods.{name}.{key}": why
        for name, method in methods.items()
        for key, why in method.idle().items()
    }


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The options of a tree by their full keys; a mapping is listed as a whole and by its parts."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{key}.")
        yield key, value


def _of_optim(recipe: Recipe) -> dict[str, str]:
    optim, steps, found = recipe.optim, recipe.run.steps, {}
    if optim.warmup >= steps:
        found["optim.warmup"] = (
            f"the run has {steps} steps (run.steps), and would end before its learning rate is "
            "reached; give fewer steps of warm-up, or a longer run"
        )
    if set(recipe.methods) <= set(optim.lrs):
        found["optim.lr"] = "every method has a learning rate of its own in optim.lrs"
    return found


def _of_run(recipe: Recipe) -> dict[str, str]:
    found = {}
    if not recipe.run.validate_every:
        found["run.timeouts.validate"] = "run.validate_every=0 never validates"
    if recipe.run.keep_adapters == 1:
        found["run.keep_adapters"] = "it is the run's own adapter, which is kept anyway; give 2"
    if not recipe.data.holds_out:
        why = "no sample is held out for the validation loss"
        more = "; give data.validation" if "validation" in type(recipe.data).model_fields else ""
        found |= dict.fromkeys(("run.validate_every", "run.timeouts.validate"), why + more)
    if not _previews(recipe):
        found["run.timeouts.preview"] = "there are no previews"
    if reason := pictures_change(recipe.data):
        found["run.cache_latents"] = f"{reason} makes other pictures at every use"
    if reason := text_trains(recipe):
        found["run.cache_text"] = reason
    if not find_family(recipe.backbone.family).text_encoders:
        found["run.base_precision.text_encoders"] = "this backbone has no text encoder"
    if recipe.run.epochs is None:
        found["data.repeats"] = (
            "run.steps says how long the run is, and all photos are repeated alike; give run.epochs"
        )
    return found


def text_trains(recipe: Recipe) -> str | None:
    """Why a prompt is not encoded to the same at every step; None where it is."""
    for name, method in recipe.methods.items():
        if name in recipe.optim.frozen:
            continue
        if method.words or method.known_words:
            return f"methods.{name} trains words, and prompts with them change at every step"
        if getattr(method, "text_encoder", ()) or getattr(method, "text_layers", ()):
            return f"methods.{name} trains the text encoders, and prompts change at every step"
    return None


def pictures_change(data: Source) -> str | None:
    """The option by which a sample's picture is another at every use; None where it is not."""
    for key in ("augment", "flip"):
        if getattr(data, key, False):
            return f"data.{key}=true"
    if getattr(data, "start", 0) == "random":
        return "data.start=random"
    return None


def _previews(recipe: Recipe) -> bool:
    return bool(recipe.preview.every and (recipe.preview.prompts or shows_captions(recipe)))


def shows_captions(recipe: Recipe) -> bool:
    """Whether captions of the data are what previews show, see `training/preview_prompts.py`."""
    given = "prompts" in (recipe.tree.get("preview") or {})
    return not given and getattr(recipe.data, "frames", 1) > 1


def _of_preview(recipe: Recipe) -> dict[str, str]:
    preview, found = recipe.preview, {}
    tree = recipe.tree.get("preview") or {}
    if not preview.every and tree.get("prompts"):
        found["preview.prompts"] = "preview.every=0 makes no previews; give the steps between two"
    # an empty list is there to have none
    if preview.every and "prompts" not in tree and not shows_captions(recipe):
        found["preview.every"] = "there is nothing to show; give preview.prompts"
    if not _previews(recipe):
        why = "there are no previews; give preview.prompts and preview.every"
        found |= dict.fromkeys(("preview.seed", "preview.negative", "preview.maps"), why)
    elif preview.maps and preview.prompts and not _shown(preview.maps, preview.prompts):
        found["preview.maps"] = f"no prompt of the previews has {preview.maps}"
    if getattr(recipe.data, "frames", 1) == 1:
        found["preview.temporal_guidance"] = PICTURES
    return found


def _shown(word: str, prompts: Iterable[str]) -> bool:
    """Whether a prompt has a word, which may be spelled as in CLIP's vocabulary, fox</w>."""
    plain = word.removesuffix("</w>").lower()
    return any(plain in text.lower() for text in prompts)


def _of_evaluate(recipe: Recipe) -> dict[str, str]:
    found, concepts = {}, list(getattr(recipe.data, "concepts", ()))
    if len(concepts) < 2 and not recipe.continual.concepts:
        found["evaluate.together"] = "it is for several concepts, a list in data.concept"
    if not concepts:
        found["evaluate.beside"] = "it is for a concept, data.source=concept"
        if getattr(recipe.data, "frames", 1) > 1:
            found["evaluate.alone"] = "clips are generated for the captions of the data"
    if getattr(recipe.data, "frames", 1) == 1:
        found["evaluate.temporal_guidance"] = PICTURES
    return found


def _of_tasks(recipe: Recipe) -> dict[str, str]:
    """What the tasks of a continual recipe replace."""
    spec = recipe.continual
    if not spec.concepts:
        return {}
    found = {"data.token": "continual.tokens names the new words, <v1>, <v2> and so on by itself"}
    if spec.class_words:
        found["data.class_word"] = "continual.class_words gives that of each concept"
    for name, method in recipe.methods.items():
        replaced = {"task", "num_tasks", "tokens"} | ({"init"} if spec.inits else set())
        for key in replaced & set(type(method).model_fields):
            found[f"methods.{name}.{key}"] = "a continual recipe sets it for each concept"
    return found
