"""Scores of a finished run beside those of its base model.

Pictures: does the model show the concept, does it show it together with other things, and does it
still know the rest? Clips: do they show the object of the caption, and does it move the way the
caption says?
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as Sheet

from trainer.backbones.backbone import Backbone
from trainer.backbones.device import CPU, Placement
from trainer.config.load import resolve_recipe
from trainer.config.schema import Recipe
from trainer.data.loader import Fixed
from trainer.data.source import Dataset, shape_of_clips
from trainer.evaluation.clip_scores import ClipScores
from trainer.evaluation.examiner import Examiner
from trainer.evaluation.judge import Judge, judge_folder
from trainer.runs.adapter import load_adapted, load_base
from trainer.training.build import needs, task_of
from trainer.training.module import QUANTILES

Table = dict[str, dict[str, float | None]]  # by column, then by score
SHARES = (  # the scores shown as percentages, beside every `concept accuracy`
    "concept beside another", "the other beside it", "two concepts together", "known sprites",
    "direction right", "object right",
)  # fmt: skip


def evaluate(
    run: Path,
    judge_at: str | None = None,
    *,
    images: int = 32,
    batch: int = 32,
    placement: Placement = CPU,
) -> Table:
    """Evaluates a run, prints the table of scores and writes it as `evaluation.json` beside the
    adapter.

    A run on clips also generates clips, for the captions of held-out ones, or of the training ones
    if none are held out; the scores of those real clips are the column `real`.

    run: a run folder or an adapter file; judge_at: the judge's folder, by default the backbone's
    own; images: pictures, and clips, for each kind of prompt; batch: pictures generated at once, at
    most; placement: where both models and the judge run.

    Returns the columns `base`, `adapted` and, for clips, `real`.

    Raises:
        ValueError: there is no adapter, or no judge for this backbone.
    """
    path = run / "adapter.safetensors" if run.is_dir() else run
    adapted, tree = load_adapted(path, placement=placement)
    recipe = resolve_recipe(tree.get("recipe", path.parent.parent.name), tree, {})
    base = load_base(recipe.backbone, recipe.backbone_name, placement, hold=False)
    judge = Judge(judge_folder(judge_at, base.folder, key="judge"), placement)
    train, held_out = recipe.data.open(needs(recipe, base))
    examiner = Examiner(
        recipe, judge, train, num_images=images, batch_size=batch, base=base, resumes=True
    )
    models = {"base": base, "adapted": adapted}
    table = _score(examiner, models, train=train, held_out=held_out)
    what = "pictures or clips" if max(train.frames) > 1 else "pictures"
    title = f"{run}, judged by {judge.folder.name}, {images} {what} a line"
    show_evaluation(table, title, Console())
    text = json.dumps(table, indent=1)
    path.with_name("evaluation.json").write_text(text, encoding="utf-8")
    examiner.finish()
    return table


def _score(
    examiner: Examiner, models: Mapping[str, Backbone], *, train: Dataset, held_out: Dataset | None
) -> Table:
    table: Table = {name: examiner.examine(model) for name, model in models.items()}
    shape = shape_of_clips(train)
    moving = shape[0] > 1
    clips = _score_clips(examiner, models, held_out or train, shape=shape) if moving else {}
    for name, model in models.items():
        table[name] |= clips.get(name, {})
        table[name]["validation loss"] = validation_loss(examiner.recipe, model, held_out)
    if moving:
        table["real"] = dict.fromkeys(table["base"]) | clips["real"]
    return table


def _score_clips(
    examiner: Examiner,
    models: Mapping[str, Backbone],
    data: Dataset,
    *,
    shape: tuple[int, float | None],
) -> Table:
    """The scores of clips that each model generates for the captions of `data`, and those of its
    own clips as the column `real`.

    shape: the frames of a clip, and how many are shown in a second.
    """
    frames, fps = shape
    scorer = ClipScores.of(examiner.judge, data, examiner.num_images)
    table = {"real": scorer.scores(scorer.real)}
    for name, model in models.items():
        generated = examiner.clips(model, scorer.captions, frames=frames, fps=fps)
        table[name] = scorer.scores(generated)
    return table


@torch.no_grad()
def validation_loss(recipe: Recipe, model: Backbone, held_out: Dataset | None) -> float | None:
    """The mean loss on held-out samples, with the noise and timesteps that training validates with,
    so that it equals `val/loss` of the run's tracker; None without held-out samples."""
    if held_out is None:
        return None
    task = task_of(recipe, model)
    fixed = Fixed(held_out, batch_size=16, moments=None)
    losses = [task.score(fixed[i].to(model.device), QUANTILES) for i in range(len(fixed))]
    return float(torch.cat(losses, dim=1).mean())


def show_evaluation(table: Table, title: str, console: Console) -> None:
    """Prints the scores, a line for each and a column for each model."""
    sheet = Sheet(title=title, title_justify="left")
    sheet.add_column("")
    for name in table:
        sheet.add_column(name, justify="right")
    for line in next(iter(table.values())):
        sheet.add_row(line, *(_written(line, scores[line]) for scores in table.values()))
    console.print(sheet)


def percent(value: float | None) -> str:
    """A share of 1 as text, `-` where it is unknown."""
    return "-" if value is None else f"{100 * value:.1f} %"


def _written(line: str, value: float | None) -> str:
    if line in SHARES or line.startswith("concept accuracy") or value is None:
        return percent(value)
    return f"{value:.4g}"
