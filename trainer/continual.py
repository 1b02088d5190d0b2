"""Continual learning: concepts one after another, each in a run that starts from the run before.
After each concept, a judge measures how well the model still shows every concept so far.

    runs/<recipe>/<id>/task-0, task-1, ...     the run folder of each concept
    runs/<recipe>/<id>/continual.json          accuracy[t][s]: of concept s after task t

The same command resumes in the same folder: a finished task is not trained again, an unfinished
one continues from its last checkpoint, and accuracies that are in the file are kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.config.header import read_header
from trainer.config.load import task_recipe
from trainer.config.schema import Recipe
from trainer.evaluation.examiner import Examiner, mean
from trainer.evaluation.judge import Judge, judge_folder
from trainer.evaluation.shares import Share, percent
from trainer.runs.adapter import load_adapted, load_base
from trainer.runs.run_folder import (
    folder_for,
    is_finished,
    made,
    note_event,
    steps_asked_of,
    write_text,
)
from trainer.training.build import needs, placement_of
from trainer.training.console import console, problem_of, say
from trainer.training.fit import fit

BATCH = 32  # pictures generated at once
Rows = list[list[float | None]]  # rows[t][s]: the accuracy of concept s after task t, s <= t


def run_continual(recipe: Recipe, folder: Path | None = None) -> Path:
    """Learns the concepts of `continual.concepts` in order, each in a run of its own.

    folder: holds all the runs; by default the run folder of the recipe.

    Returns:
        that folder.

    Raises:
        ValueError: the folder holds another sequence of concepts, or one that was learned in
            another number of steps; or there is no judge.
    """
    spec, folder = recipe.continual, made(folder or folder_for(recipe))
    _check_steps(recipe, folder)
    rows = _read(folder / "continual.json", recipe)
    judge = Judge(judge_of(recipe), placement_of(recipe.run)) if spec.images else None
    examiners: list[Examiner] = []
    if judge is not None and len(rows) < len(spec.concepts):
        examiners = _examiners(recipe, judge)
    learned: Path | None = None
    for number, concept in enumerate(spec.concepts):
        task_folder, task = folder / f"task-{number}", task_recipe(recipe, number, learned)
        learned = task_folder / "adapter.safetensors"
        if not is_finished(task_folder, task):
            console.print(f"task {number}: {concept}", highlight=False, markup=False)
            fit(task, task_folder)
        if examiners and number == len(rows):
            row = _judged(recipe, folder, learned, examiners=examiners[: number + 1])
            if row is None:
                examiners = []
                continue
            rows.append(row)
            _write(folder / "continual.json", recipe, rows)
            for each in examiners:
                each.finish()
    if rows:
        show_continual(recipe, rows, console)
    return folder


def _check_steps(recipe: Recipe, folder: Path) -> None:
    """A concept that is learned is not learned further: the next one starts from its adapter."""
    for number in range(len(recipe.continual.concepts)):
        path = folder / f"task-{number}" / "adapter.safetensors"
        if path.is_file() and (done := steps_asked_of(read_header(path)[0])) != recipe.run.steps:
            raise ValueError(
                f"{folder}: concept {number} was learned in {done} steps, and "
                f"run.steps={recipe.run.steps}; give run.steps={done} to resume, or another run.id"
            )


def _judged(
    recipe: Recipe, folder: Path, learned: Path, *, examiners: Sequence[Examiner]
) -> list[float | None] | None:
    """The accuracies of the concepts so far; None where judging fails, as without memory: the
    other concepts are learned all the same, and the same command judges what is missing."""
    try:
        adapted, _ = load_adapted(learned, placement=placement_of(recipe.run))
        return [each.accuracy(adapted) for each in examiners]
    except Exception as error:
        reason = problem_of(error)
    note_event(folder, "evaluation_failed", adapter=str(learned), reason=reason)
    say(
        f"evaluation of {learned} failed: {reason}; the concepts are learned all the same, and the "
        "same command judges them later",
        "red",
    )
    return None


def _examiners(recipe: Recipe, judge: Judge) -> list[Examiner]:
    """One for each concept. The base generates the class images that a concept's data may need."""
    placement, spec = placement_of(recipe.run), recipe.continual
    base = load_base(recipe.backbone, recipe.backbone_name, placement, hold=False)
    examiners = []
    for number in range(len(recipe.continual.concepts)):
        task = task_recipe(recipe, number)
        train, _ = task.data.open(needs(task, base))
        examiners.append(
            Examiner(task, judge, train, num_images=spec.images, batch_size=BATCH, resumes=True)
        )
    return examiners


def summary(rows: Rows) -> dict[str, float | None]:
    """The mean accuracy after the last task, and forgetting: the accuracy lost since each concept
    before the last was learned, as the mean over s of accuracy[s][s] - accuracy[T - 1][s]. Both are
    None where an accuracy is unknown."""
    last = rows[-1]
    pairs = [(rows[s][s], last[s]) for s in range(len(last) - 1)]
    lost = [None if then is None or now is None else then - now for then, now in pairs]
    return {"mean final accuracy": mean(last), "forgetting": mean(lost)}


def show_continual(recipe: Recipe, rows: Rows, to: Console) -> None:
    """Prints the accuracies, a line for each task and a column for each concept."""
    title = f"{recipe.name}: concept accuracy after each task, with 95 % intervals"
    sheet = Table(title=title, title_justify="left")
    for name in ("after", *recipe.continual.concepts):
        sheet.add_column(name, justify="left" if name == "after" else "right")
    for number, row in enumerate(rows):
        sheet.add_row(recipe.continual.concepts[number], *map(percent, row))
    to.print(sheet)
    facts = ", ".join(f"{name} {percent(value)}" for name, value in summary(rows).items())
    to.print(facts, highlight=False)


def _read(path: Path, recipe: Recipe) -> Rows:
    """The accuracies measured so far.

    Raises:
        ValueError: they were measured with other concepts, tokens or numbers of pictures.
    """
    if not path.is_file():
        return []
    facts = json.loads(path.read_text(encoding="utf-8"))
    for name, value in _asked(recipe).items():
        if facts.get(name, value) != value:  # an earlier version wrote fewer
            key = name if "." in name else f"continual.{name}"
            raise ValueError(
                f"{path} was made with {key}={facts[name]}, and this run has {value}; choose "
                "another run.id"
            )
    count = recipe.continual.images  # of each concept
    return [
        [None if value is None else Share(value, count) for value in row]
        for row in facts["accuracy"]
    ]


def _write(path: Path, recipe: Recipe, rows: Rows) -> None:
    facts = {**_asked(recipe), "accuracy": rows, **summary(rows)}
    write_text(path, json.dumps(facts, indent=1))


def _asked(recipe: Recipe) -> dict[str, Any]:
    """What the accuracies depend on, by key; in `continual` where nothing else is said."""
    own = recipe.continual.model_dump(mode="json")
    how = recipe.evaluate.model_dump(
        mode="json", include={"alone", "steps", "guidance", "negative"}
    )
    own["tokens"] = list(recipe.continual.words)
    return {**own, **{f"evaluate.{name}": value for name, value in how.items()}}


def judge_of(recipe: Recipe) -> Path:
    """The folder of the judge; raises ValueError where there is none."""
    return judge_folder(
        recipe.continual.judge,
        recipe.backbone.folder,
        key="continual.judge",
        instead=", or continual.images=0 to judge nothing",
    )
