"""Tables of scores, a column for each model and a line for each score: how they are printed, which
way of a score is better, and which model is best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table as Sheet

from trainer.common.score_names import better, is_share
from trainer.evaluation.examiner import Scores
from trainer.evaluation.shares import Share, percent

Table = dict[str, Scores]  # by column, then by score
WIDEST = 1000  # letters of a line


def with_drift(table: Table) -> Table:
    """With the line prior drift after PRES: how much more the pictures of the plain class look like
    the photos than those of the column `base`, which has 0."""
    found: Table = {}
    for column, scores in table.items():
        found[column] = {}
        for line, value in scores.items():
            found[column][line] = value
            before = table["base"].get(line)
            if line.startswith("PRES") and value is not None and before is not None:
                found[column][line.replace("PRES", "prior drift", 1)] = value - before
    return found


def with_counts(table: Table) -> dict[str, Mapping[str, float | None]]:
    """With a column `pictures`: of how many each share is, for those who read the file."""
    lines = [item for scores in table.values() for item in scores.items()]
    counts = {line: value.count for line, value in lines if isinstance(value, Share)}
    return {**table, "pictures": counts}


def best_lines(table: Table, columns: Sequence[str]) -> list[str]:
    """A sentence for each of `columns` that is best in some lines; where several are equal, none
    is. A line that one of them lacks says nothing."""
    won: dict[str, list[str]] = {}
    for line in table[columns[0]]:
        values = {name: table[name].get(line) for name in columns}
        known = {name: value for name, value in values.items() if value is not None}
        if not better(line) or len(known) < len(columns):
            continue
        top = max(better(line) * value for value in known.values())
        first = [name for name, value in known.items() if better(line) * value == top]
        if len(first) == 1:
            won.setdefault(first[0], []).append(line)
    return [f"{name} is best in {', '.join(won[name])}" for name in columns if name in won]


def show_evaluation(table: Table, title: str, console: Console) -> None:
    """Prints the scores, a line for each and a column for each model. Where the output is no
    terminal it is as wide as the table."""
    sheet = Sheet(title=title, title_justify="left")
    sheet.add_column("")
    for name in table:
        sheet.add_column(name, justify="right")
    for line in lines_of(table):
        sheet.add_row(line, *(score_text(line, scores.get(line)) for scores in table.values()))
    if not console.is_terminal:
        options = console.options.update(max_width=WIDEST)
        console.width = max(console.width, console.measure(sheet, options=options).maximum)
    console.print(sheet)


def lines_of(table: Mapping[str, Scores]) -> list[str]:
    """The lines of all columns, each once."""
    return list(dict.fromkeys(line for scores in table.values() for line in scores))


def show_notes(notes: Sequence[str], console: Console) -> None:
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def score_text(line: str, value: float | None) -> str:
    """A score as it is printed."""
    if is_share(line) or value is None:
        return percent(value)
    return f"{value:.4g}"
