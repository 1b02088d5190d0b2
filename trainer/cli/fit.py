"""`fit`: trains what a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.cli.options import quiet_libraries
from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError

if TYPE_CHECKING:
    pass


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
    from trainer.training.fit import fit as run

    folder = run(loaded, Path(places[0].removeprefix("run=")).expanduser() if places else None)
    if first_rank():
        print(folder)
    return 0
