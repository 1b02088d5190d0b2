"""`fit`: trains what a recipe says."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from trainer.cli.options import RecipeOptions, quiet_libraries, split_options
from trainer.cli.resume_command import resume_command, says_how_to_resume
from trainer.common.uncompiled import nothing_compiled
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe, RecipeError
from trainer.runs.run_folder import folder_for


class FitOptions(RecipeOptions):
    """Trains a recipe and prints the run folder with the adapter. Every key of the recipe can be
    given as well, as in optim.lr=1e-4."""

    run: Path | None = Field(
        None,
        description="the run folder: a run in it resumes where it stopped, a finished one stays as "
        "it is; null makes runs/<recipe>/<id>",
    )


def run(words: list[str]) -> int:
    section = [word for word in words if word.startswith("run={")]
    if "run=" in words:
        raise RecipeError("run= is empty; name a folder, as in run=runs/custom_diffusion/<id>")
    options, rest = split_options([word for word in words if word not in section], FitOptions)
    loaded = load_recipe([*rest, *section])
    if options.run is not None and loaded.run.id is not None:
        raise RecipeError(
            f"run={options.run} and run.id={loaded.run.id} both name a folder; give one"
        )
    quiet_libraries()
    from trainer.training.console import first_rank, say

    if first_rank():
        for line in loaded.said:
            say(line)
    folder = folder_for(loaded) if options.run is None else options.run.expanduser()
    with says_how_to_resume(resume_command(words, loaded, folder)):
        train_recipe(loaded, folder)
    if first_rank():
        print(folder)
    return 0


def train_recipe(recipe: Recipe, folder: Path | None = None) -> Path:
    """Trains a recipe in one run, or in a run for each of its `continual.concepts`.

    Returns the folder of the run, or the one that holds the runs of all concepts.
    """
    if recipe.continual.concepts:
        with nothing_compiled():
            from trainer.continual import run_continual

        return run_continual(recipe, folder)
    with nothing_compiled():
        from trainer.training.fit import fit

    return fit(recipe, folder)
