"""A recipe: one YAML, `key=value` overrides, and a complete check of both before torch is imported.

Names resolve to files of ours and to nothing else: a backbone to `recipes/backbone/<name>.yaml`, a
data source to `trainer/data/sources/<name>.py`, a method to `trainer/methods/<level>/<name>.py`. A
backbone may also be a folder of weights, or the result of a finished run. A recipe with
`base: <recipe>` states only what differs from that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.backbones.spec import PartsSpec
from trainer.common.paths import RECIPES
from trainer.common.section import Section
from trainer.common.suggest import nearest
from trainer.config.backbone_limits import check_limits
from trainer.config.captions import check_words
from trainer.config.continual_recipes import check_tasks, task_overlay
from trainer.config.lineage import family_of_backbone, lineage_of, spec_of
from trainer.config.optimiser_notes import check_optimiser
from trainer.config.optimisers import with_own_lr
from trainer.config.overrides import parse_words
from trainer.config.own_values import TABLES, with_own_values
from trainer.config.partners import check_partners, flat, idle_options, refuse_idle
from trainer.config.prompts import check_texts, follow_data, unspelled, with_words, words_of
from trainer.config.run_length import in_steps, laid_over, told_length
from trainer.config.run_section import RunSpec
from trainer.config.schema import KEYS, SECTIONS, TRACKER_PACKAGES, TRACKERS, Recipe, RecipeError
from trainer.config.sections import OptimSpec
from trainer.config.tree import merge_trees, read_yaml
from trainer.config.unknown_keys import refuse_unknown
from trainer.config.value_errors import build_section
from trainer.data.source import Source
from trainer.methods.apply import find_method, method_names
from trainer.methods.method import Method


def load_recipe(arguments: Iterable[str]) -> Recipe:
    """`["recipe=custom_diffusion", "data.concept=./dog"]` to a checked recipe.

    Raises:
        RecipeError: anything wrong with it; nothing has been read but YAML, captions, and the small
        files of the backbone, and folders have been seen to exist.
    """
    overrides = parse_words(arguments)
    name = overrides.pop("recipe", None)
    if not isinstance(name, str):
        raise RecipeError(f"recipe=<name> is missing; recipes: {', '.join(recipe_names())}")
    recipe = resolve_recipe(name, read_recipe(name), overrides)
    frozen = recipe.optim.frozen
    # checked here alone: the recipe in an adapter's header has no start_from
    if frozen and recipe.run.start_from is None:
        raise RecipeError(
            f"optim.lrs.{frozen[0]}=0 keeps it as an earlier run left it, and there is none; give "
            "run.start_from=<a run or its adapter>, or an lr above 0"
        )
    parts = _runs(recipe)
    check_partners(recipe, parts, overrides)
    _check_file(name, recipe, parts)
    said = [line for part in parts for line in _checked(part)]
    return replace(recipe, said=tuple(dict.fromkeys(said)))


def _check_file(name: str, recipe: Recipe, parts: list[Recipe]) -> None:
    """Refuses options without effect that a user's own file gives, unless it is for what is given
    beside the file that they have none."""
    own = user_values(name, recipe.backbone_name)
    idle = idle_options(recipe, parts)
    if not any(key in idle for key, _ in flat(own)):
        return
    try:
        alone = resolve_recipe(name, read_recipe(name), {"backbone": recipe.backbone_name})
        before = idle_options(alone, _runs(alone))
    except RecipeError:  # what the file lacks was given beside it
        return
    refuse_idle({key: why for key, why in before.items() if key in idle}, own)


def _runs(recipe: Recipe) -> list[Recipe]:
    """The recipes of single runs: of each concept of a continual one, or the recipe itself."""
    return [task_recipe(recipe, n) for n in range(len(recipe.continual.concepts))] or [recipe]


def user_values(name: str, backbone: str) -> dict[str, Any]:
    """What the user's own file says of a recipe, with the files of the user's it is based on; empty
    for a shipped recipe."""
    path = _recipe_file(name, f"recipe={name}", Path())
    tree: dict[str, Any] = {}
    while path.parent != RECIPES:
        own = read_yaml(path)
        family = partial(family_of_backbone, backbone)
        tree = laid_over(with_own_values(own, lineage_of(backbone)[0], family), tree)
        base = tree.pop("base", None)
        if base is None:
            break
        path = _recipe_file(base, f"{path}: base: {base}", path.parent)
    return tree


def _checked(recipe: Recipe) -> list[str]:
    """What a user is told of a recipe of one run; raises RecipeError for what its backbone cannot
    do, or does not read."""
    check_limits(recipe)
    check_tracker(recipe.tracker)
    said = unspelled(recipe.data, recipe.methods, recipe.backbone)
    data = recipe.data
    said = [*data.found(), *told_length(recipe.run, data), *said, *data.remarks()]
    run = recipe.run
    sharded = run.strategy if run.shards else None
    return [*said, *check_words(recipe), *check_optimiser(recipe.optim, run.device, sharded)]


def check_tracker(name: str) -> None:
    """Raises RecipeError for a tracker whose package is not installed."""
    if name in TRACKER_PACKAGES and find_spec(name) is None:
        raise RecipeError(
            f"tracker={name} needs the package: pip install 'attention-trainer[{name}]'"
        )


def resolve_recipe(name: str, tree: dict[str, Any], overrides: Mapping[str, Any]) -> Recipe:
    """Lays the backbone's own values and the overrides over a recipe's tree; checks the result."""
    tree = _overlaid(name, tree, overrides)
    _check_keys(tree)
    sections = {key: build_section(cls, tree.get(key), key) for key, cls in SECTIONS.items()}
    tracker = tree.get("tracker", "tensorboard")
    if tracker not in TRACKERS:
        raise RecipeError(f"tracker={tracker}: no such tracker{nearest(str(tracker), TRACKERS)}")
    spec = spec_of(tree)
    tree.pop("denoiser", None)
    data = _data(tree.get("data"))
    run = sections["run"]
    assert isinstance(run, RunSpec)
    tree, sections["run"] = in_steps(tree, run, data)
    tree["methods"] = follow_data(tree.get("methods"), data)
    chosen = methods_of(tree["methods"])
    _check_words(data, chosen)
    sections["optim"] = _optim(sections["optim"], tree["methods"], chosen)
    if spec.denoiser is not None and not spec.adapters:
        # complete, so that an adapter does not depend on our defaults
        tree["denoiser"] = spec.denoiser.model_dump(mode="json")
    kinds = tree.get("continual") and sections["continual"].class_words  # type: ignore[attr-defined]
    words = words_of(data, chosen, spec, kinds=kinds or data.kinds)
    sections |= with_words(sections, words)
    check_texts(data, words, spec)
    recipe = Recipe(
        name=name,
        backbone_name=tree["backbone"],
        backbone=spec,
        data=data,
        methods=chosen,
        tracker=tracker,
        tree=tree,
        **sections,  # type: ignore[arg-type]
    )
    if recipe.continual.concepts:
        check_tasks(recipe)
        for number in range(len(recipe.continual.concepts)):
            task_recipe(recipe, number)
    return recipe


def _overlaid(name: str, tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The tree under what it says for the backbone and its family, under what the user's own file
    says, under the overrides."""
    backbone = overrides.get("backbone", tree.get("backbone", "tiny"))
    if not isinstance(backbone, str) or not backbone:
        raise RecipeError(
            f"backbone is {backbone!r}; it is a name or a folder, as in backbone=tiny"
        )
    below = with_own_values(tree, lineage_of(backbone)[0], partial(_family, tree, overrides))
    if any(tree.get(table) for table in TABLES):
        # a base's values for a backbone do not replace what the file over it gives
        below = laid_over(below, user_values(name, backbone))
    below["data"] = _of_source(below.get("data"), overrides.get("data"))
    return with_own_lr(laid_over(below, overrides) | {"backbone": backbone})


def _family(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> str:
    """The family of the backbone that a recipe names under the overrides."""
    chosen = merge_trees(tree, overrides)
    parts = build_section(PartsSpec, chosen.get("parts"), "parts")
    return family_of_backbone(chosen.get("backbone", "tiny"), parts)


def _of_source(data: Any, given: Any) -> Any:
    """The options `data` of a recipe that a given source has too; of its own source all."""
    source = given.get("source") if isinstance(given, dict) else None
    if not isinstance(data, dict) or source not in Source.names() or source == data.get("source"):
        return data
    return {key: data[key] for key in data if key in Source.find(source).model_fields}


def _check_keys(tree: Mapping[str, Any]) -> None:
    """Raises `RecipeError` for an unknown key, or for one that belongs into a section."""
    for key in tree:
        homes = [f"{name}.{key}" for name, cls in SECTIONS.items() if key in cls.model_fields]
        if homes and key not in KEYS:
            raise RecipeError(f"{key}: no such key; did you mean {' or '.join(homes)}?")
    refuse_unknown(tree, KEYS, "")


def _optim(section: Section, named: Iterable[str], chosen: Mapping[str, Method]) -> OptimSpec:
    """The optimiser, its `lrs` without those of methods that methods.<name>=null has removed.

    named: the methods the recipe names, removed ones too.
    """
    assert isinstance(section, OptimSpec)
    refuse_unknown(section.lrs, named, "optim.lrs")
    kept = {method: lr for method, lr in section.lrs.items() if method in chosen}
    return section.model_copy(update={"lrs": kept})


def task_recipe(recipe: Recipe, number: int, start_from: Path | None = None) -> Recipe:
    """The ordinary recipe of concept `number` of a continual one.

    start_from: the adapter of the concept before, whose tensors its run continues from.
    """
    tree = merge_trees(recipe.tree, task_overlay(recipe, number))
    start = {"run": {"start_from": str(start_from)}} if start_from else {}
    try:
        return resolve_recipe(recipe.name, tree, start)
    except RecipeError as error:
        raise RecipeError(f"continual.concepts.{number}: {error}") from None


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The tree of a shipped recipe, or of a YAML file of the user's (`recipe=./mine.yaml`), laid
    over that of the recipe it names as its `base`."""
    return _over_base(_recipe_file(name, f"recipe={name}", Path()), ())


def _over_base(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """above: the files whose `base` led here, the recipe itself first."""
    tree, chain = read_yaml(path), (*above, path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise RecipeError(f"{path}: base is {base!r}; it takes the name of a recipe, or a file")
    below = _recipe_file(base, f"{path}: base: {base}", path.parent)
    if below in chain:
        names = " -> ".join(file.name for file in (*chain, below))
        raise RecipeError(f"{path}: base is circular, {names}; remove one of them")
    return laid_over(_over_base(below, chain), tree)


def _recipe_file(name: str, word: str, folder: Path) -> Path:
    """word: how the name was given; folder: where a relative path begins."""
    if name in recipe_names():
        return RECIPES / f"{name}.yaml"
    path = (folder / Path(name).expanduser()).resolve()
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        what = "file" if path.suffix in (".yaml", ".yml") else "recipe"
        raise RecipeError(f"{word}: no such {what}{nearest(path.stem, recipe_names())}")
    return path


def _data(tree: Any) -> Source:
    if not isinstance(tree, dict) or not isinstance(tree.get("source"), str):
        raise RecipeError(f"data.source is missing; sources: {', '.join(Source.names())}")
    values = dict(tree)
    source = values.pop("source")
    if source not in Source.names():
        raise RecipeError(f"data.source={source}: no such source{nearest(source, Source.names())}")
    cls = Source.find(source)
    # null removes an option that a base recipe set for another source
    values = {k: value for k, value in values.items() if value is not None or k in cls.model_fields}
    for name, why in cls.lacks().items():
        if name in values:
            raise RecipeError(f"data.{name}: {why}")
    refuse_unknown(values, ("source", *cls.model_fields), "data")
    return build_section(cls, values, "data")


def _check_words(data: Source, chosen: Mapping[str, Method]) -> None:
    """Refuses data whose words no method adds, where methods add words at all: a method would train
    a word that no caption holds. Methods may add more words, which captions beside photos hold."""
    added = {word: name for name, method in chosen.items() for word in method.words}
    if added and (lacking := [word for word in data.words if word not in added]):
        raise RecipeError(
            f"data.token={lacking[0]}: methods.{next(iter(added.values()))} adds "
            f"{', '.join(added)}; name the same words in both"
        )


def methods_of(tree: Any) -> dict[str, Method]:
    """The methods of a recipe's tree, in its order."""
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise RecipeError(f"methods is {tree!r}; it maps method names to their options")
    result = {}
    for name, values in tree.items():
        if name not in method_names():
            raise RecipeError(f"methods.{name}: no such method{nearest(str(name), method_names())}")
        if values is None:
            continue  # methods.lora=null removes it
        result[name] = build_section(find_method(name), values, f"methods.{name}")
    if not result:
        null = f" (methods.{next(iter(tree))}=null removes it; {{}} keeps it)" if tree else ""
        raise RecipeError(
            f"methods is empty{null}, so nothing would train; methods: {', '.join(method_names())}"
        )
    return result
