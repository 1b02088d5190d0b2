"""`fit`: trains what a recipe says."""

from __future__ import annotations

from pathlib import Path

from trainer.cli.options import quiet_libraries
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe, RecipeError


def run(words: list[str]) -> int:
    """`run=<folder>` is where: a run there goes on, one that is finished is left as it is."""
    places = [word for word in words if word.startswith("run=") and word[4:5] != "{"]
    loaded = load_recipe(word for word in words if word not in places)
    if len(places) > 1 or "run=" in places:
        raise RecipeError("run=<folder> is given once, as in run=runs/custom_diffusion/<id>")
    if places and loaded.run.id is not None:
        raise RecipeError(f"{places[0]} and run.id={loaded.run.id} both name a folder; give one")
    quiet_libraries()
    from trainer.training.console import first_rank

    given = Path(places[0].removeprefix("run=")).expanduser() if places else None
    folder = train_recipe(loaded, given)
    if first_rank():
        print(folder)
    return 0


def train_recipe(recipe: Recipe, folder: Path | None = None) -> Path:
    """Trains a recipe in one run, or in a run for each of its `continual.concepts`.

    Returns the folder of the run, or the one that holds the runs of all concepts.
    """
    if recipe.continual.concepts:
        from trainer.continual import run_continual

        return run_continual(recipe, folder)
    from trainer.training.fit import fit

    return fit(recipe, folder)
