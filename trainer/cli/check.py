"""`check`: validates a recipe and its data, and with `plan=true` shows what would train."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from trainer.backbones import weights_here
from trainer.cli.options import RecipeOptions, quiet_libraries, split_options
from trainer.common.uncompiled import nothing_compiled
from trainer.config.load import load_recipe, recipe_names
from trainer.config.schema import Recipe, RecipeError
from trainer.runs.resume_check import check_folder
from trainer.runs.run_folder import check_place, folder_for
from trainer.training.data_check import check_by_opening

# what decides whether methods fit a backbone
DECIDE = ("backbone", "denoiser", "methods", "objective", "optim")


class CheckOptions(RecipeOptions):
    """Checks a recipe and opens its data without loading a weight. Every key of the recipe can be
    given as well, as in optim.lr=1e-4."""

    plan: bool = Field(
        False,
        description="apply the methods to the backbone without reading its weights, and print what "
        "would train and about how much memory it takes; one on the hub need not be downloaded",
    )


def run(words: list[str]) -> int:
    options, rest = split_options(words, CheckOptions)
    loaded = load_recipe(rest)
    for line in loaded.said:
        print(line)
    check_run_folder(loaded)
    _check_machine(loaded)
    for line in check_by_opening(loaded):
        print(line)
    if not options.plan:
        unknown = _fit_unknown(loaded)
        print(
            f"{loaded.name}: fine; backbone {loaded.backbone_name}, methods "
            f"{', '.join(loaded.methods)}"
        )
        if unknown:
            print(f"whether the methods fit the backbone is for plan=true to find out: {unknown}")
        if not weights_here(loaded.backbone):
            print(
                f"the weights of {loaded.backbone.hub} are not on this machine yet; plan=true says "
                "how much memory they and this run take, before they are downloaded"
            )
        return 0
    _show_plan(loaded)
    return 0


def check_run_folder(recipe: Recipe) -> None:
    """Raises ValueError where `fit` could not write its run folder, or go on with what is there."""
    if recipe.run.id is not None and not recipe.continual.concepts:
        check_folder(folder_for(recipe), recipe)
    check_place(folder_for(recipe))


def check_together(recipes: Sequence[Recipe]) -> list[str]:
    """Opens the data of recipes that are trained together, and sees whether their methods fit their
    backbones; what several have alike, once. Returns what is to be said."""
    lines: list[str] = []
    opened: list[object] = []
    fitted: list[object] = []
    for recipe in recipes:
        lines += recipe.said
        data = (recipe.tree["data"], recipe.backbone_name, recipe.run.resolution)
        if data not in opened:
            opened.append(data)
            lines += check_by_opening(recipe)
        fits = (recipe.methods, recipe.backbone_name, recipe.objective, recipe.optim.name)
        if fits not in fitted:
            fitted.append(fits)
            if unknown := _fit_unknown(recipe):
                lines.append(f"whether the methods fit the backbone, the run finds out: {unknown}")
    return list(dict.fromkeys(lines))


def _check_machine(recipe: Recipe) -> None:
    """Refuses a device or precision that this machine has not, and concepts that no judge is there
    for. Where the recipe names none of them, torch is not needed."""
    run, continual = recipe.run, recipe.continual
    if run.device != "auto" or run.precision not in ("auto", "fast") or run.base_precision:
        from trainer.backbones.device import choose_placement

        choose_placement(run.device, run.precision, parts=run.base_precision)
    if continual.concepts and continual.images:
        quiet_libraries()
        from trainer.continual import judge_of

        judge_of(recipe)


def _show_plan(recipe: Recipe) -> None:
    """Prints what would train, and how much memory it takes."""
    quiet_libraries()
    from rich.console import Console

    with nothing_compiled():
        from trainer.backbones.device import choose_placement
        from trainer.training.device_defaults import auto_lines
        from trainer.training.memory_estimate import memory_lines, memory_of
        from trainer.training.plan_report import describe_plan, show_plan
        from trainer.training.without_weights import planned

    run = recipe.run
    placement = choose_placement(run.device, run.precision, parts=run.base_precision)
    backbone, plan = planned(recipe, placement)
    memory = memory_of(recipe, backbone, plan)
    facts = describe_plan(recipe, backbone, plan, memory=memory.at(placement.device))
    show_plan(facts, recipe.methods, Console(width=max(100, Console().width)))
    print(f"adapter: {len(plan.stored)} tensors, as {plan.stored[0]}")
    chosen = auto_lines(recipe, backbone, placement.device)
    for line in (*memory_lines(memory, placement), *chosen):
        print(line)


def _decided_alike(one: Recipe, other: Recipe) -> bool:
    """Whether methods fit the backbone in both recipes, if they do in one."""
    again = one.run.gradient_checkpointing, other.run.gradient_checkpointing
    return again[0] == again[1] and all(one.tree.get(k) == other.tree.get(k) for k in DECIDE)


def _fit_unknown(recipe: Recipe) -> str | None:
    """Refuses what the recipe's methods cannot do to its backbone; returns why that is not known,
    or None. Recipes that ship are known to fit, which needs no torch."""
    run = recipe.run
    plain = run.start_from is None and not run.base_precision and not run.shards
    if plain and recipe.name in recipe_names():
        try:
            shipped = load_recipe([f"recipe={recipe.name}"])
        except RecipeError:  # it needs data of the user's
            shipped = None
        if shipped and _decided_alike(shipped, recipe):
            return None
    quiet_libraries()
    with nothing_compiled():
        from trainer.training.without_weights import refuse_unfit

    return refuse_unfit(recipe)
