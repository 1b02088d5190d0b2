"""What a run folder says of its run, read for a page: only text and JSON, no weights.

A folder may be half written or damaged: what cannot be read is left out and named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

MARKS = ("metrics.jsonl", "events.jsonl", "plan.json", "adapter.safetensors", "checkpoints")
ENDS = ("finished", "stopped")
EMPTY = "no run is in it"

Curve = Mapping[int, float | None]  # by step; None where it was not finite


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it. recipe: the resolved one, with the text it was written as;
    curves: every logged number by its name; scores: of `evaluation.json`, by column and line;
    problems: what could not be read."""

    folder: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    plan: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    scores: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    problems: Sequence[str] = ()

    @property
    def name(self) -> str:
        """Recipe and id, as `lora/20261201-120000`."""
        return "/".join(self.folder.resolve().parts[-2:])

    @property
    def steps(self) -> int:
        """The last step of which something is known."""
        logged = [max(curve, default=0) for curve in self.curves.values()]
        done = [each["step"] for each in self.events if type(each.get("step")) is int]
        return max((*logged, *done), default=0)

    @property
    def state(self) -> str:
        """Whether it has ended, and how, in a few words."""
        begun = [i for i, each in enumerate(self.events) if each.get("event") == "started"]
        since = self.events[begun[-1] :] if begun else self.events
        ended = [each for each in since if each.get("event") in ENDS]
        if not ended:
            return f"not finished; known up to step {self.steps}"
        if ended[-1]["event"] == "finished":
            return f"finished after {ended[-1].get('step')} steps"
        return f"stopped by {ended[-1].get('signal')} after step {ended[-1].get('step')}"

    @property
    def command(self) -> str | None:
        """What it was begun or resumed with last, where that was a command."""
        given = [each.get("command") for each in self.events if each.get("event") == "started"]
        return next((each for each in reversed(given) if isinstance(each, str)), None)


def read_record(folder: Path) -> RunRecord:
    """Reads a run folder.

    Raises:
        ValueError: it is none, or its recipe cannot be read; the message says which.
    """
    place = folder / "recipe.yaml"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not place.is_file():
        if is_marked(folder):
            raise ValueError(f"{folder}: half written, it has no recipe.yaml")
        raise ValueError(
            f"{folder}: no run folder, it has no recipe.yaml; a folder of runs is given as runs="
        )
    try:
        text = place.read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        recipe, text = None, ""
    if not isinstance(recipe, dict) or not isinstance(recipe.get("methods"), dict):
        raise ValueError(f"{folder}: its recipe.yaml is damaged, or not that of a run")
    problems: list[str] = []
    return RunRecord(
        folder,
        recipe,
        text,
        plan=_mapping(folder / "plan.json", problems),
        curves=curves_of(json_lines(folder / "metrics.jsonl", problems)),
        events=json_lines(folder / "events.jsonl", problems),
        scores=_scores(_mapping(folder / "evaluation.json", problems)),
        problems=problems,
    )


def is_marked(folder: Path) -> bool:
    """Whether a folder has something that only runs have."""
    return any((folder / name).exists() for name in MARKS)


def records_in(root: Path, depth: int = 4) -> tuple[list[RunRecord], list[str]]:
    """Every run in a folder and the folders in it, by their paths, and a sentence for each folder
    that is passed over."""
    if is_marked(root) or (root / "recipe.yaml").is_file():
        try:
            return [read_record(root)], []
        except ValueError as error:
            return [], [str(error)]
    found: list[RunRecord] = []
    said: list[str] = []
    for place in _folders(root) if depth else ():
        runs, problems = records_in(place, depth - 1)
        found += runs
        empty = not runs and all(problem.endswith(EMPTY) for problem in problems)
        said += [f"{place}: {EMPTY}"] if empty else problems
    return found, said


def _folders(root: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from sorted(
            place for place in root.iterdir() if place.is_dir() and not place.name.startswith(".")
        )


def json_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The JSON objects of a file with one a line; damaged lines are counted in `problems`."""
    found, wrong = [], 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in filter(str.strip, lines):
        own = None
        with suppress(ValueError, RecursionError):
            own = json.loads(line)
        if isinstance(own, dict):
            found.append(own)
        else:
            wrong += 1
    if wrong:
        problems.append(f"{path.name}: {wrong} of {len(lines)} lines are damaged and left out")
    return found


def _mapping(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    own = None
    with suppress(OSError, ValueError, RecursionError):
        own = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(own, dict):
        problems.append(f"{path.name} is damaged and left out")
        return {}
    return own


def curves_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float | None]]:
    """By name and step; of a step that was trained again the later value counts."""
    found: dict[str, dict[int, float | None]] = {}
    for row in rows:
        step = row.get("step")
        if type(step) is not int or step < 0:
            continue
        for name, value in row.items():
            if name in ("step", "time"):
                continue
            found.setdefault(name, {})[step] = known_number(value)
    return {name: dict(sorted(curve.items())) for name, curve in found.items()}


def _scores(tree: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """The columns that are tables of numbers."""
    return {
        column: {line: known_number(value) for line, value in lines.items()}
        for column, lines in tree.items()
        if isinstance(lines, dict)
    }


def known_number(value: object) -> float | None:
    """A number; None for one that is not known, not finite or larger than any of ours."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with suppress(OverflowError):
        return float(value) if isfinite(value) else None
    return None
