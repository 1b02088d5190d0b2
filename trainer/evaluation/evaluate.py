"""Base beside adapted, in numbers: is the concept there, does it keep company, is the rest still
known? Do clips show what is to move, and does it go where it should?"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from trainer.backbones.backbone import Backbone
from trainer.config.load import resolve_recipe
from trainer.config.schema import Recipe
from trainer.data.loader import Fixed
from trainer.data.source import Dataset, shape_of_clips
from trainer.evaluation.clip_scores import Footage
from trainer.evaluation.examiner import Examiner
from trainer.evaluation.judge import Judge, judge_folder
from trainer.runs.adapter import load_adapted, load_base
from trainer.training.build import needs, objective, optim
from trainer.training.module import QUANTILES, DiffusionModule


def evaluate(
    run: Path, judge_at: str | None, images: int, batch: int
) -> dict[str, dict[str, float | None]]:
    """Judges a run folder, prints the table and keeps it as `evaluation.json` in the folder. A run
    on clips is asked for clips too, by the captions of held-out ones; what is said of these stands
    beside it as `real`.

    Raises:
        ValueError: no adapter there, or no judge for this backbone.
    """
    path = run / "adapter.safetensors" if run.is_dir() else run
    adapted, tree = load_adapted(path)
    run_recipe = resolve_recipe(tree.get("recipe", path.parent.parent.name), tree, {})
    base = load_base(run_recipe.backbone, run_recipe.backbone_name)
    judge = Judge(judge_folder(judge_at, base.folder, "judge"))
    train, held_out = run_recipe.data.open(needs(run_recipe, base))
    examiner = Examiner(run_recipe, judge, train, images, batch, base)
    models = {"base": base, "adapted": adapted}
    table = {name: examiner.examine(model) for name, model in models.items()}
    frames, fps = shape_of_clips(train)
    footage = Footage.of(judge, held_out or train, images) if frames > 1 else None
    for name, model in models.items():
        if footage:
            table[name] |= footage.scores(examiner.film(model, footage.captions, frames, fps))
        table[name]["validation loss"] = validation_loss(run_recipe, model, held_out)
    if footage:
        table["real"] = dict.fromkeys(table["base"]) | footage.scores(footage.real)
    what = "pictures or clips" if footage else "pictures"
    show_evaluation(
        table, f"{run}, judged by {judge.folder.name}, {images} {what} a line", Console()
    )
    target = path.parent / "evaluation.json"
    target.write_text(json.dumps(table, indent=1), encoding="utf-8")
    return table


@torch.no_grad()
def validation_loss(chosen: Recipe, model: Backbone, held_out: Dataset | None) -> float | None:
    """The validation loss of training, on the same noise: `val/loss` of the run's tracker."""
    if held_out is None:
        return None
    module = DiffusionModule(model, objective(chosen, model), optim(chosen), (), chosen.run.seed)
    fixed = Fixed(held_out, 16, QUANTILES, None)
    losses = [module.sample_losses(fixed[i], "validate", 0.0)[0] for i in range(len(fixed))]
    return float(torch.cat(losses).mean())


def show_evaluation(
    table: dict[str, dict[str, float | None]], title: str, console: Console
) -> None:
    sheet = Table(title=title, title_justify="left")
    sheet.add_column("")
    for name in table:
        sheet.add_column(name, justify="right")
    for line in next(iter(table.values())):
        sheet.add_row(line, *(_written(line, scores[line]) for scores in table.values()))
    console.print(sheet)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _written(line: str, value: float | None) -> str:
    share = line in (
        "concept beside another",
        "the other beside it",
        "two concepts together",
        "known sprites",
        "direction right",
        "object right",
    ) or line.startswith("concept accuracy")
    return percent(value) if share or value is None else f"{value:.4g}"
