"""Several adapters beside each other: of several runs, or of one run along the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from PIL.Image import Image
from rich.console import Console
from torch import Tensor

from trainer.backbones.part_digests import part_digests
from trainer.common.paths import shipped
from trainer.common.score_names import LOSS, better, is_share
from trainer.common.version import name_and_version
from trainer.config.header import file_of, read_header
from trainer.config.lineage import spec_of
from trainer.evaluation.evaluate import Evaluation, Judging, evaluation_file, write_scores
from trainer.evaluation.generated import SEED
from trainer.evaluation.score_table import (
    Table,
    best_lines,
    lines_of,
    show_evaluation,
    show_notes,
    with_counts,
)
from trainer.evaluation.which_step import Choice, step_to_keep
from trainer.media.line_charts import Chart, line_charts
from trainer.media.made_by import png_bytes, with_facts
from trainer.runs.run_folder import kept_adapters, run_of_adapter, steps_asked_of

BY_STEP = "evaluation_by_step"


def evaluate_runs(runs: Sequence[Path], how: Judging) -> Table:
    """Evaluates several runs on one backbone and prints a column for each, and which is best in
    which line. Each run's own columns are written beside its adapter, as `evaluate` does.

    Returns the columns `base`, one for each run by its name and, for clips, `real`.

    Raises:
        ValueError: runs that cannot be compared, by name, and why.
    """
    paths = {name: file_of(run) for name, run in _named(runs).items()}
    _check_backbones(paths)
    own: dict[str, Evaluation] = {}
    for name, path in paths.items():
        own[name] = Evaluation(path, how, beside=next(iter(own.values()), None))
        _check_questions(own, name)
    first = next(iter(own.values()))
    table: Table = {}
    with first.progress(models=1 + len(own)) as work:
        for each in own.values():
            each.report_to(work)
        table["base"] = first.score(first.base)
        for name, each in own.items():
            table[name] = each.score(each.adapted(each.path))
    table = first.completed(table)
    notes = list(dict.fromkeys(note for each in own.values() for note in each.notes))
    losses = _without_unlike_losses(own, table, notes)
    # the base was asked with the first one's words
    alone = [name for name, each in own.items() if _prompts(each) != _prompts(first)]
    if alone:
        notes.append(
            f"the base was asked with the words of {next(iter(own))}, so no evaluation.json is "
            f"written for {', '.join(alone)}"
        )
    show_evaluation(table, f"{len(own)} runs, {first.described}", console := Console())
    show_notes([*best_lines(table, list(own)), *notes], console)
    for name in own.keys() - set(alone):
        # the losses of the base and the first run are of the same samples and noise
        known = losses if own[name] is first else {}
        write_scores(evaluation_file(own[name].path), with_counts(_of_one(table, name, known)))
    for each in own.values():
        each.finish()
    return table


def evaluate_steps(run: Path, how: Judging) -> Table:
    """Evaluates every adapter that a run has kept (`run.keep_adapters`), prints a column for each
    and which to keep, writes both as `evaluation_by_step.json` into the run folder, and draws the
    scores over the steps as `evaluation_by_step.png`.

    Returns the columns `base`, one for each step and, for clips, `real`.

    Raises:
        ValueError: the run has kept no adapters along the way.
    """
    run = _run_of(shipped(run))
    paths = _along_the_way(run)
    own = Evaluation(next(reversed(paths.values())), how)
    table: Table = {}
    with own.progress(models=1 + len(paths)) as work:
        own.report_to(work)
        table["base"] = own.score(own.base)
        for step, path in paths.items():
            table[_column(step)] = own.score(own.adapted(path))
    table = own.completed(table)
    choice = step_to_keep(table["base"], {step: table[_column(step)] for step in paths})
    _tell_steps(run, own, table, choice=choice, paths=paths)
    own.finish()
    return table


def _tell_steps(
    run: Path, own: Evaluation, table: Table, *, choice: Choice, paths: Mapping[int, Path]
) -> None:
    """Prints the figures of a run's adapters and which to keep, and writes and draws them."""
    console = Console()
    show_evaluation(table, f"{run}, {own.described}", console)
    show_notes([*own.notes, choice.why], console)
    facts = {
        "judges": [str(judge.folder) for judge in own.judges],
        "images": own.how.images,
        "seed": SEED,
        "evaluate": own.recipe.evaluate.model_dump(mode="json"),
        "table": table,
        **asdict(choice),
        "adapter": None if choice.step is None else str(paths[choice.step].relative_to(run)),
        "notes": own.notes,
    }
    write_scores(run / f"{BY_STEP}.json", facts)
    if choice.step is not None:
        console.print(f"adapter: {paths[choice.step]}", highlight=False, soft_wrap=True)
    if (curves := draw_steps(table, list(paths), choice)) is not None:
        drawn = run / f"{BY_STEP}.png"
        what = {"run": run.name, "recipe": own.recipe.name, "rows": list(paths)}
        what["version"] = name_and_version()
        drawn.write_bytes(png_bytes(with_facts(curves, what)))
        console.print(f"curves: {drawn}", highlight=False, soft_wrap=True)


def draw_steps(table: Table, steps: Sequence[int], choice: Choice) -> Image | None:
    """A small chart for each score that is known of two steps, with the base's as a dashed line and
    the step to keep marked; and one for the points of the rule. None where there is none."""
    charts = []
    for line in lines_of(table):
        values = [table[_column(step)].get(line) for step in steps]
        # prior drift is PRES but for a constant
        if sum(value is not None for value in values) > 1 and not line.startswith("PRES"):
            way = {1: "more is better", -1: "less is better", 0: ""}[better(line)]
            level = table["base"].get(line)
            charts.append(Chart(line, way, values, level=level, percent=is_share(line)))
    if choice.points:
        points = [choice.points[step] for step in steps]
        charts.append(Chart("points of the rule", "more is better", points, level=0.0))
    if not charts:
        return None
    return line_charts(charts, steps, x_label="step", level="base", mark=choice.step)


def _run_of(place: Path) -> Path:
    """The run folder that an adapter file is in; a folder is one itself."""
    return run_of_adapter(place) if place.is_file() else place


def _column(step: int) -> str:
    return f"step {step}"


def _along_the_way(run: Path) -> dict[int, Path]:
    """The adapters that a run has kept and its own one, by their steps."""
    paths = kept_adapters(run)
    if not paths:
        raise ValueError(
            f"run={run}: no adapters along the way are in it; every=true compares those that "
            "run.keep_adapters=5 keeps"
        )
    own = run / "adapter.safetensors"
    if own.is_file():
        paths[steps_asked_of(read_header(own)[0])] = own
    return dict(sorted(paths.items()))


def _named(runs: Sequence[Path]) -> dict[str, Path]:
    """The runs by short names that tell them apart.

    Raises:
        ValueError: a run is named twice.
    """
    places = [_place(run) for run in runs]
    if twice := [place for number, place in enumerate(places) if place in places[:number]]:
        raise ValueError(f"runs names {twice[0]} twice; name each run once")
    short = [place.stem if place.is_file() else place.name for place in places]
    plain = len(set(short)) == len(short) and not {"base", "real"} & set(short)
    long = [f"{place.parent.name}/{name}" for place, name in zip(places, short, strict=True)]
    names = short if plain else long if len(set(long)) == len(long) else list(map(str, places))
    return dict(zip(names, runs, strict=True))


def _place(run: Path) -> Path:
    where = shipped(run).resolve()
    return where.parent if where.name == "adapter.safetensors" else where


def _check_backbones(paths: Mapping[str, Path]) -> None:
    """Raises ValueError for a run on another backbone than the first one's."""
    trees = {name: read_header(path)[0] for name, path in paths.items()}
    parts = {name: part_digests(spec_of(tree)) for name, tree in trees.items()}
    first = next(iter(paths))
    for name, own in parts.items():
        unlike = [part for part in own | parts[first] if own.get(part) != parts[first].get(part)]
        if unlike:
            raise ValueError(
                f"runs: {name} was trained on backbone {trees[name]['backbone']} and {first} on "
                f"{trees[first]['backbone']}, which differ in {', '.join(unlike)}; compare runs "
                "on one backbone"
            )


def _check_questions(own: Mapping[str, Evaluation], name: str) -> None:
    """Raises ValueError for a run that is asked otherwise than the first, or whose pictures are
    compared with other ones."""
    first = next(iter(own))
    one, other = own[first], own[name]
    before, now = _conditions(one), _conditions(other)
    for key, value in now.items():
        if before[key] != value:
            raise ValueError(
                f"runs: {name} and {first} cannot be compared, since {key} is {value} in the one "
                f"and {before[key]} in the other"
            )
    if _prompts(one, "{token}") != _prompts(other, "{token}"):
        raise ValueError(
            f"runs: {name} and {first} cannot be compared, since their recipes ask for other "
            "prompts (section evaluate, or the captions of the data)"
        )
    photos = zip(_photos(one), _photos(other), strict=False)
    same = len(_photos(one)) == len(_photos(other))
    if not same or not all(torch.equal(a, b) for a, b in photos):
        raise ValueError(
            f"runs: {name} and {first} cannot be compared, since their data show other pictures"
        )


def _conditions(own: Evaluation) -> dict[str, object]:
    """How pictures are generated, by the keys that say so."""
    asked, run = own.recipe.evaluate, own.recipe.run
    keys = ("steps", "guidance", "true_guidance", "temporal_guidance", "negative")
    return {f"evaluate.{key}": getattr(asked, key) for key in keys} | {
        "run.resolution": run.resolution or own.base.resolution,
        "text.max_tokens": own.recipe.backbone.max_tokens,
        "frames of a clip": own.frames,
    }


def _prompts(own: Evaluation, token: str | None = None) -> list[list[str]]:
    """All that a model is asked for; token: stands for the word of each concept."""
    asked = own.examiner.asked
    groups = (asked.alone, asked.plain, asked.beside, asked.together, asked.known)
    found = [each.prompts for group in groups for each in group]
    found += [] if own.clips is None else [own.clips.captions]
    words = [] if token is None else [each.token for each in asked.subjects]
    for word in words:
        found = [[prompt.replace(word, str(token)) for prompt in prompts] for prompts in found]
    return found


def _photos(own: Evaluation) -> list[Tensor]:
    """What generated pictures or clips are compared with."""
    features = [photos for each in own.examiner.asked.alone for photos in each.subjects[0].photos]
    return [*features, *([] if own.clips is None else [own.clips.real])]


def _without_unlike_losses(
    own: Mapping[str, Evaluation], table: Table, notes: list[str]
) -> dict[str, float | None]:
    """The validation losses by column, taken out of the table, where those of the runs cannot be
    compared, which is noted."""
    if not _unlike_losses(own):
        return {}
    notes.append(
        "no validation loss: the runs hold out other samples, predict other targets or differ in "
        "run.seed, from which the noise is drawn"
    )
    return {name: scores.pop(LOSS, None) for name, scores in table.items()}


def _unlike_losses(own: Mapping[str, Evaluation]) -> bool:
    """Whether the validation losses of some runs cannot be compared."""
    found = []
    for each in own.values():
        held_out, objective = each.held_out, each.recipe.objective
        keys = [] if held_out is None else [held_out.key(i) for i in range(len(held_out))]
        # the noise that is predicted is drawn from the seed
        found.append((keys, objective.target, objective.path, each.recipe.run.seed))
    return any(each != found[0] for each in found)


def _of_one(table: Table, name: str, losses: Mapping[str, float | None]) -> Table:
    """The columns of one run; losses: validation losses by column that `table` has no more."""
    columns = {"base": "base", "adapted": name, "real": "real"}
    return {
        column: table[own] | ({LOSS: losses[own]} if losses.get(own) is not None else {})
        for column, own in columns.items()
        if own in table
    }
