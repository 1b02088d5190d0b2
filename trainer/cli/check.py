"""`check`: validates a recipe, and with `plan=true` shows what would train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.cli.options import quiet_libraries
from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError

if TYPE_CHECKING:
    pass


def run(words: list[str]) -> int:
    """Validates without loading a weight; with plan=true loads the backbone and prints what would
    train."""
    plan = [word for word in words if word.startswith("plan=")]
    loaded = load_recipe(word for word in words if word not in plan)
    if plan and plan[-1] not in ("plan=true", "plan=false"):
        raise RecipeError(f"{plan[-1]}: plan is true or false")
    if "plan=true" not in plan:
        print(
            f"{loaded.name}: fine; backbone {loaded.backbone_name}, methods "
            f"{', '.join(loaded.methods)}"
        )
        return 0
    quiet_libraries()
    from rich.console import Console

    from trainer.methods.apply import apply_methods
    from trainer.runs.adapter import load_base
    from trainer.training import plan_report
    from trainer.training.plan_report import describe_plan, show_plan

    backbone = load_base(loaded.backbone, loaded.backbone_name)
    applied = apply_methods(backbone, loaded.methods, held=loaded.optim.held)
    if loaded.run.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    facts = describe_plan(
        loaded, backbone, applied, plan_report.peak_memory(loaded, backbone, applied)
    )
    show_plan(facts, loaded.methods, Console(width=max(100, Console().width)))
    return 0
