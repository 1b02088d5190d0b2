"""Several runs beside each other: their curves in common charts, what differs in their recipes, and
which of them is best by each number."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.common.score_names import better
from trainer.runs.page.charts import POINTS, PageChart, chart
from trainer.runs.page.record import RunRecord

UNLIKE_ALWAYS = ("run.id", "run.out")
# the names of logged numbers of which less is better, and more
LESS_LOGGED = r"train/loss.*|val/.*|time/.*|train/\w+_memory_mib"
MORE_LOGGED = r"train/\w+_per_second|train/model_tflops|train/mfu"
PARTIAL = r".*_t\d+|weight_norm/.*"  # parts of a number that has a chart itself
ALIKE, FEWEST = 4, 100  # so many runs have as many points as one alone; and a curve, at least
WITHOUT = "-"
LONG = 80  # letters of a value in the table


@dataclass(frozen=True)
class ComparedRun:
    """One run in the table. values: the text of each column."""

    name: str
    values: Sequence[str]


@dataclass(frozen=True)
class Compared:
    """names: of the runs, in their order; runs: a row for each, under `columns`; differences: key
    and the value of each run; best: by the name of each number, the runs from the best one on with
    their values; charts: a chart for each number that two or more steps know."""

    names: Sequence[str]
    columns: Sequence[str]
    runs: Sequence[ComparedRun]
    differences: Sequence[tuple[str, Sequence[str]]]
    best: Mapping[str, Sequence[tuple[str, float]]]
    charts: Sequence[PageChart]


def beside_each_other(runs: Sequence[RunRecord]) -> Compared:
    """What a page says of several runs."""
    names = short_names(runs)
    own = list(zip(names, runs, strict=True))
    numbers = {name: last_values(run) for name, run in own}
    logged = dict.fromkeys(name for run in runs for name in run.curves)
    points = max(FEWEST, POINTS * ALIKE // max(ALIKE, len(runs)))
    charts = [
        chart(number, {name: run.curves.get(number, {}) for name, run in own}, points=points)
        for number in logged
        if not re.fullmatch(PARTIAL, number)
    ]
    return Compared(
        names,
        ("state", "backbone", "methods", "parameters trained", "held-out loss", "training loss"),
        [_row(name, run) for name, run in own],
        differences=differences(runs),
        best=best_by(numbers),
        charts=[each for each in charts if each is not None],
    )


def short_names(runs: Sequence[RunRecord]) -> list[str]:
    """The last parts of their paths, as many as tell them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _row(name: str, run: RunRecord) -> ComparedRun:
    trained = run.plan.get("trained")
    return ComparedRun(
        name,
        [
            run.state,
            str(run.recipe.get("backbone", WITHOUT)),
            ", ".join(run.recipe["methods"]) or WITHOUT,
            f"{trained:,}" if isinstance(trained, int) else WITHOUT,
            *(_last(run, number) for number in ("val/loss", "train/loss_smooth")),
        ],
    )


def _last(run: RunRecord, number: str) -> str:
    value = last_values(run).get(number)
    return WITHOUT if value is None else f"{value:.4g}"


def last_values(run: RunRecord) -> dict[str, float]:
    """The last known value of each logged number, and the scores of the adapter."""
    found: dict[str, float] = {}
    for number, curve in run.curves.items():
        known = [value for value in curve.values() if value is not None]
        found |= {number: known[-1]} if known else {}
    scores = run.scores.get("adapted", {})
    return found | {line: value for line, value in scores.items() if value is not None}


def way(number: str) -> int:
    """1 where more of a number is better, -1 where less is, 0 where neither is."""
    if re.fullmatch(LESS_LOGGED, number):
        return -1
    return 1 if re.fullmatch(MORE_LOGGED, number) else better(number)


def best_by(numbers: Mapping[str, Mapping[str, float]]) -> dict[str, list[tuple[str, float]]]:
    """The runs by each number that has a better way and that two of them know, the best first."""
    every = dict.fromkeys(number for own in numbers.values() for number in own)
    found: dict[str, list[tuple[str, float]]] = {}
    for number in filter(way, every):
        known = [(name, own[number]) for name, own in numbers.items() if number in own]
        if len(known) > 1:
            found[number] = sorted(known, key=lambda each: -way(number) * each[1])
    return found


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Each key of the recipes whose values are not all alike, with the value of each run."""
    flat = [flat_tree(run.recipe) for run in runs]
    keys = dict.fromkeys(key for own in flat for key in own)
    found = []
    for key in sorted(keys.keys() - set(UNLIKE_ALWAYS)):
        values = [own.get(key, WITHOUT) for own in flat]
        if len(set(values)) > 1:
            found.append((key, values))
    return found


def flat_tree(tree: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """The values of a nested mapping as texts, by their full keys."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= flat_tree(value, f"{before}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            found[f"{before}{key}"] = text if len(text) <= LONG else f"{text[:LONG]}…"
    return found
