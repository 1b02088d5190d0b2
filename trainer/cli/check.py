"""`check`: validates a recipe, and with `plan=true` shows what would train."""

from __future__ import annotations

from pydantic import Field

from trainer.cli.options import RecipeOptions, quiet_libraries, split_options
from trainer.config.load import load_recipe
from trainer.runs.resuming import check_folder
from trainer.runs.run_folder import folder_for


class CheckOptions(RecipeOptions):
    """Checks a recipe without loading a weight. Every key of the recipe can be given as well, as in
    optim.lr=1e-4."""

    plan: bool = Field(
        False,
        description="load the backbone, apply the methods, and print what would train and about "
        "how much memory it takes",
    )


def run(words: list[str]) -> int:
    options, rest = split_options(words, CheckOptions)
    loaded = load_recipe(rest)
    for line in loaded.said:
        print(line)
    if loaded.run.id is not None and not loaded.continual.concepts:
        check_folder(folder_for(loaded), loaded)
    if not options.plan:
        print(
            f"{loaded.name}: fine; backbone {loaded.backbone_name}, methods "
            f"{', '.join(loaded.methods)}"
        )
        return 0
    quiet_libraries()
    from rich.console import Console

    from trainer.runs.adapter import load_base
    from trainer.training import plan_report
    from trainer.training.build import adapt, placement_of
    from trainer.training.plan_report import describe_plan, show_plan

    placement = placement_of(loaded.run)
    backbone = load_base(loaded.backbone, loaded.backbone_name, placement, hold=False)
    applied = adapt(loaded, backbone, placement)
    peak = plan_report.peak_memory(loaded, backbone, applied)
    facts = describe_plan(loaded, backbone, applied, memory=peak)
    show_plan(facts, loaded.methods, Console(width=max(100, Console().width)))
    return 0
