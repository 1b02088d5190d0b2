"""Concepts one after another: a run for each that goes on from the one before, and after each, how
much is left of every concept so far.

    runs/<recipe>/<id>/task-0, task-1, ...     the run folder of each concept
    runs/<recipe>/<id>/continual.json          accuracy[t][s]: concept s after task t

Started again in the same folder it goes on where it was: a finished task is not trained again,
an unfinished one goes on from its last checkpoint, what has been judged is not judged again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.config.load import task_recipe
from trainer.config.schema import Recipe
from trainer.evaluation.evaluate import percent
from trainer.evaluation.examiner import Examiner, mean
from trainer.evaluation.judge import Judge, judge_folder
from trainer.runs.adapter import load_adapted, load_base
from trainer.runs.run_folder import folder_for, is_finished, write_text
from trainer.training.build import needs
from trainer.training.console import console
from trainer.training.fit import fit

BATCH = 32  # pictures painted at once
Rows = list[list[float | None]]


def run_continual(whole: Recipe, folder: Path | None = None) -> Path:
    """Learns the concepts of `continual.concepts` in order and returns the folder of all of them:
    `folder`, or the one of the recipe's id.

    Raises:
        ValueError: the folder holds another sequence, or there is no judge.
    """
    spec, folder = whole.continual, folder or folder_for(whole)
    folder.mkdir(parents=True, exist_ok=True)
    rows = _read(folder / "continual.json", whole)
    judge = Judge(_judge_folder(whole)) if spec.images else None
    examiners: list[Examiner] = []
    if judge is not None and len(rows) < len(spec.concepts):
        examiners = _examiners(whole, judge)
    learned: Path | None = None
    for number in range(len(spec.concepts)):
        place, own = folder / f"task-{number}", task_recipe(whole, number, learned)
        learned = place / "adapter.safetensors"
        if not is_finished(place, own):
            console.print(f"task {number}: {spec.concepts[number]}", highlight=False, markup=False)
            fit(own, place)
        if examiners and number == len(rows):
            adapted, _ = load_adapted(learned)
            rows.append([each.accuracy(adapted) for each in examiners[: number + 1]])
            _write(folder / "continual.json", whole, rows)
    if rows:
        show_continual(whole, rows, console)
    return folder


def _examiners(whole: Recipe, judge: Judge) -> list[Examiner]:
    """One for each concept. The base is here for the class images its data may ask for."""
    base = load_base(whole.backbone, whole.backbone_name)
    found = []
    for number in range(len(whole.continual.concepts)):
        own = task_recipe(whole, number)
        train, _ = own.data.open(needs(own, base))
        found.append(Examiner(own, judge, train, whole.continual.images, BATCH))
    return found


def summary(rows: Rows) -> dict[str, float | None]:
    """The mean accuracy after the last task, and forgetting: what the concepts before the last have
    lost since each was learned, mean over s of accuracy[s][s] - accuracy[T - 1][s]."""
    last = rows[-1]
    pairs = [(rows[s][s], last[s]) for s in range(len(last) - 1)]
    lost = [None if then is None or now is None else then - now for then, now in pairs]
    return {"mean final accuracy": mean(last), "forgetting": mean(lost)}


def show_continual(whole: Recipe, rows: Rows, to: Console) -> None:
    sheet = Table(title=f"{whole.name}: concept accuracy after each task", title_justify="left")
    for name in ("after", *whole.continual.concepts):
        sheet.add_column(name, justify="left" if name == "after" else "right")
    for number, row in enumerate(rows):
        sheet.add_row(whole.continual.concepts[number], *map(percent, row))
    to.print(sheet)
    facts = ", ".join(f"{name} {percent(value)}" for name, value in summary(rows).items())
    to.print(facts, highlight=False)


def _read(path: Path, whole: Recipe) -> Rows:
    """The rows judged so far."""
    if not path.is_file():
        return []
    facts = json.loads(path.read_text(encoding="utf-8"))
    for name, value in _asked(whole).items():
        if facts.get(name) != value:
            raise ValueError(
                f"{path} was made with continual.{name}={facts.get(name)}, and this run has "
                f"{value}; choose another run.id"
            )
    rows: Rows = facts["accuracy"]
    return rows


def _write(path: Path, whole: Recipe, rows: Rows) -> None:
    facts = {**_asked(whole), "accuracy": rows, **summary(rows)}
    write_text(path, json.dumps(facts, indent=1))


def _asked(whole: Recipe) -> dict[str, Any]:
    spec = whole.continual
    return {"concepts": list(spec.concepts), "tokens": list(spec.words), "images": spec.images}


def _judge_folder(whole: Recipe) -> Path:
    return judge_folder(
        whole.continual.judge,
        whole.backbone.folder,
        "continual.judge",
        ", or continual.images=0 to judge nothing",
    )
