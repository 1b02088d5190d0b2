"""Writes the page of a run, and the page that compares several.

Each is one HTML file with its pictures, its styles and the charting library uPlot inside. A policy
in it forbids the browser to fetch anything, so a text of a user's that should pass for a script or
an address would do nothing; besides, every text is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from trainer.common.score_names import is_share
from trainer.common.version import name_and_version
from trainer.runs.page.charts import charts_of
from trainer.runs.page.comparison import beside_each_other
from trainer.runs.page.record import RunRecord, known_number, read_record, records_in
from trainer.runs.page.shown_previews import Previews, previews_of
from trainer.runs.run_folder import write_text

REPORT = "report.html"
MARK = '<meta name="generator" content="attention-trainer">'
ASSETS = Path(__file__).parent / "assets"
EVENTS = 200  # the latest, at most


def write_run_page(folder: Path) -> Path:
    """Writes `report.html` into a run folder, in place of an earlier one, and returns its path.

    Raises:
        ValueError: it is no run folder, or its report.html is not one of ours.
    """
    return _write(folder / REPORT, run_page(read_record(folder)))


def write_comparison(root: Path) -> tuple[Path, int, list[str]]:
    """Writes `report.html` into a folder of runs: all of them on one page.

    Returns its path, how many runs it shows, and a sentence for each folder that was passed over.

    Raises:
        ValueError: no run is there, or the report.html there is not one of ours.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; name one with runs, as in report runs/")
    runs, said = records_in(root)
    if not runs:
        raise ValueError(f"{root}: no run is in it; name a run folder or a folder of runs")
    return _write(root / REPORT, comparison_page(root, runs, said)), len(runs), said


def refresh_page(folder: Path) -> str | None:
    """Writes the page of a run that has one, since something in its folder has changed. Returns why
    it could not be written, None if it was or if there is none."""
    if not (folder / REPORT).is_file():
        return None
    try:
        write_run_page(folder)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def run_page(run: RunRecord) -> str:
    """The HTML of one run."""
    previews, charts = previews_of(run.folder), charts_of(run.curves)
    shown = [each for each in run.events if isinstance(each.get("event"), str)]
    data = {"charts": [each.data for each in charts], "previews": _preview_data(previews)}
    return _rendered(
        "run.html.j2",
        data,
        title=run.name,
        run=run,
        facts=trained_facts(run),
        methods=method_rows(run),
        charts=charts,
        previews=previews,
        scores=score_rows(run),
        columns=list(run.scores),
        events=[_event(each) for each in shown[-EVENTS:]],
        left_out=max(0, len(shown) - EVENTS),
    )


def comparison_page(root: Path, runs: Sequence[RunRecord], said: Sequence[str]) -> str:
    """The HTML of several runs."""
    table = beside_each_other(runs)
    data = {"charts": [each.data for each in table.charts], "best": table.best}
    title = f"{len(runs)} runs in {root.resolve().name}"
    return _rendered("compare.html.j2", data, title=title, table=table, said=said)


def trained_facts(run: RunRecord) -> list[tuple[str, str]]:
    """What was trained: names and values."""
    plan, recipe = run.plan, run.recipe
    found = [
        ("recipe", str(recipe.get("recipe", run.folder.parent.name))),
        ("backbone", str(recipe.get("backbone", "not said"))),
    ]
    data = recipe.get("data")
    if isinstance(data, dict):
        found.append(("data", str(data.get("source", "not said"))))
    trained, total = plan.get("trained"), plan.get("total")
    if isinstance(trained, int) and isinstance(total, int) and 0 <= trained <= total > 0:
        share = f"{100 * trained / total:.2f} %"
        found.append(("parameters trained", f"{trained:,} of {total:,} ({share})"))
    adapter = run.folder / "adapter.safetensors"
    if adapter.is_file():
        found.append(("adapter", f"{adapter.stat().st_size / 1e6:.2f} MB"))
    elif (size := known_number(plan.get("adapter_bytes"))) is not None:
        found.append(("adapter", f"about {size / 1e6:.2f} MB, not written yet"))
    return found


def method_rows(run: RunRecord) -> list[tuple[str, str, str, int, str]]:
    """Name, kind, options, number of sites and parameters of each method, as far as they can be
    read."""
    edits = run.plan.get("methods")
    found = []
    for name, edit in edits.items() if isinstance(edits, dict) else ():
        if not isinstance(edit, dict):
            continue
        options, sites = run.recipe["methods"].get(name), edit.get("sites")
        given = options.items() if isinstance(options, dict) else ()
        words = " ".join(f"{key}={value}" for key, value in given)
        count = len(sites) if isinstance(sites, list) else 0
        found.append(
            (name, str(edit.get("kind", "")), words, count, str(edit.get("parameters", "")))
        )
    return found


def score_rows(run: RunRecord) -> list[tuple[str, list[str]]]:
    """The lines of the evaluation, with the text of each column."""
    lines = dict.fromkeys(line for column in run.scores.values() for line in column)
    return [
        (line, [_score(column, name, line) for name, column in run.scores.items()])
        for line in lines
    ]


def _score(column: Mapping[str, float | None], name: str, line: str) -> str:
    value = column.get(line)
    if value is None:
        return "-"
    return f"{100 * value:.0f} %" if is_share(line) and name != "pictures" else f"{value:.4g}"


def _event(facts: Mapping[str, Any]) -> tuple[str, str, str]:
    """The time, the event, and what else is known of it."""
    left = {key: value for key, value in facts.items() if key not in ("time", "event")}
    more = [f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
            for key, value in left.items()]  # fmt: skip
    return str(facts.get("time", "")), str(facts["event"]), ", ".join(more)[:600]


def _preview_data(previews: Previews) -> dict[str, Any]:
    return {
        "steps": previews.steps,
        "prompts": [
            {"pictures": dict(each.pictures), "maps": dict(each.maps)} for each in previews.prompts
        ],
    }


@cache
def _templates() -> Environment:
    found = Environment(
        loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return found


@cache
def _own(name: str) -> Markup:
    """A file of ours, which needs no escaping."""
    return Markup((ASSETS / name).read_text(encoding="utf-8"))


def _rendered(template: str, data: Mapping[str, Any], **facts: Any) -> str:
    # no text in it can end the script element that it stands in
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = (
        _templates()
        .get_template(template)
        .render(
            mark=Markup(MARK),
            styles=[_own("uPlot.min.css"), _own("page.css")],
            scripts=[_own("uPlot.iife.min.js"), _own("page.js")],
            data=Markup(text),
            version=name_and_version(),
            **facts,
        )
    )
    # a byte of a command line that was no UTF-8 is no character that a file takes
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def _write(path: Path, text: str) -> Path:
    """Raises ValueError where another file has its name."""
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            if MARK not in file.read(2000):
                raise ValueError(
                    f"{path}: this file is not a page of this program; move it away, and the page "
                    "is written"
                )
    write_text(path, text)
    return path
