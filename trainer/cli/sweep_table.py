"""The table of a sweep: what each run has reached, and which one is best by what."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.common.exit_codes import CODES
from trainer.runs.page.record import Curve, curves_of, json_lines

LINES = 10  # of the training loss, whose mean is shown: one batch says little


@dataclass(frozen=True)
class Column:
    """A number of `metrics.jsonl`, and which value of it is the better one."""

    name: str
    better: Literal["lower", "higher"]


@dataclass(frozen=True)
class RunRow:
    """One run. values: of the swept keys; numbers: by the names of columns, without those that the
    run has not logged or that were not finite."""

    name: str
    values: Mapping[str, Any]
    state: str
    numbers: Mapping[str, float]


def row_of(
    name: str,
    values: Mapping[str, Any],
    folder: Path,
    *,
    columns: Sequence[Column],
    code: int | None,
) -> RunRow:
    """What a run folder says of itself. code: what its process has just ended with, if it ran."""
    curves = curves_of(json_lines(folder / "metrics.jsonl", []))
    finished = (folder / "adapter.safetensors").is_file() and not code
    steps = [step for curve in curves.values() for step in curve]
    stopped = f"stopped at step {max(steps)}" if steps else "not begun"
    failed = f"failed with {code}" if code and code not in CODES.values() else stopped
    found = {column.name: _number(curves.get(column.name, {}), column.name) for column in columns}
    numbers = {column: number for column, number in found.items() if number is not None}
    return RunRow(name, values, state="finished" if finished else failed, numbers=numbers)


def best_of(rows: Sequence[RunRow], column: Column) -> RunRow | None:
    """The best of the finished runs; None where none has logged that number."""
    having = [row for row in rows if column.name in row.numbers and row.state == "finished"]
    sign = 1 if column.better == "lower" else -1
    return min(having, key=lambda row: sign * row.numbers[column.name], default=None)


def table_facts(rows: Sequence[RunRow], columns: Sequence[Column]) -> dict[str, Any]:
    """The table as plain values, for `sweep.json`."""
    best = {column.name: found.name for column in columns if (found := best_of(rows, column))}
    runs = [
        {"run": row.name, "values": dict(row.values), "state": row.state, **row.numbers}
        for row in rows
    ]
    return {"runs": runs, "best": best}


def show_table(rows: Sequence[RunRow], columns: Sequence[Column]) -> None:
    """Prints the table, the best number of each column with a star, and a line for each of them."""
    from rich.console import Console
    from rich.table import Table

    keys = list(rows[0].values)
    table = Table(box=None, pad_edge=False)
    for heading in (*keys, "state", *(column.name for column in columns)):
        table.add_column(heading, overflow="fold")
    best = {column.name: best_of(rows, column) for column in columns}
    for row in rows:
        numbers = [
            f"{row.numbers[name]:.6g}" + (" *" if best[name] is row else "")
            if name in row.numbers
            else "-"
            for name in best
        ]
        table.add_row(
            *(json.dumps(row.values[key], ensure_ascii=False) for key in keys), row.state, *numbers
        )
    # a value in brackets is no markup
    Console(width=max(100, Console().width), markup=False).print(table)
    for column in columns:
        if (found := best[column.name]) is not None:
            print(f"best by {column.name}: {found.name}, {found.numbers[column.name]:.6g}")
        else:
            print(f"best by {column.name}: no finished run has logged it")


def _number(curve: Curve, name: str) -> float | None:
    """The last number of a curve; of the training loss the mean of the last `LINES`."""
    values = [value for value in curve.values() if value is not None]
    if not values:
        return None
    last = values[-LINES:] if name == "train/loss" else values[-1:]
    return sum(last) / len(last)
