"""Which numbers of a run stand together in one chart, and as how many points."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.runs.page.record import Curve

POINTS = 500  # of a line, at most: more than a screen has pixels for
LINES = 16  # of a chart, at most
# title, unit, and what the names of its numbers match as a whole; in the order of the page
GROUPS: tuple[tuple[str, str, str], ...] = (
    ("Loss", "", r"train/loss(_smooth)?|val/loss"),
    ("Training loss by timestep", "", r"train/loss_t\d+"),
    ("Held-out loss by timestep", "", r"val/loss_t\d+"),
    ("Norm of the gradients", "", r"train/grad_norm"),
    ("Update over weights", "", r"train/update_ratio"),
    ("Norm of the trained weights by block", "", r"weight_norm/.+"),
    ("Learning rate", "", r"lr/.+|train/effective_lr"),
    ("Speed", "a second", r"train/\w+_per_second"),
    ("Time of a step", "ms", r"time/\w+_ms"),
    ("Memory", "MiB", r"train/\w+_memory_mib"),
    ("Model FLOPs", "TFLOP/s", r"train/model_tflops"),
    ("Model FLOPs utilisation", "", r"train/mfu"),
    ("Data", "", r"data/\w+"),
)


@dataclass(frozen=True)
class Line:
    """One curve of a chart; values: at the chart's steps, None where there is none."""

    name: str
    values: Sequence[float | None]

    @property
    def summary(self) -> tuple[float, float, float, float]:
        """The first, the last, the least and the largest value."""
        known = [value for value in self.values if value is not None]
        return known[0], known[-1], min(known), max(known)


@dataclass(frozen=True)
class PageChart:
    """Curves over common steps. note: what is not shown."""

    title: str
    unit: str
    steps: Sequence[int]
    lines: Sequence[Line]
    note: str = ""

    @property
    def described(self) -> str:
        """A sentence for those who do not see it."""
        shown = [f"{line.name} from {line.summary[0]:.4g} to {line.summary[1]:.4g}" for line in
                 self.lines[:4]]  # fmt: skip
        more = f" and {len(self.lines) - 4} more" if len(self.lines) > 4 else ""
        steps = f"steps {self.steps[0]} to {self.steps[-1]}"
        return f"{self.title} over {steps}: {', '.join(shown)}{more}"

    @property
    def data(self) -> dict[str, Any]:
        """As the script of the page reads it."""
        return {
            "title": self.title,
            "unit": self.unit,
            "steps": list(self.steps),
            "lines": [{"name": line.name, "values": list(line.values)} for line in self.lines],
        }


def charts_of(curves: Mapping[str, Curve]) -> list[PageChart]:
    """The charts of a run: those of `GROUPS`, and one for each number beside them."""
    left, found = dict(curves), []
    for title, unit, pattern in GROUPS:
        own = {name: left.pop(name) for name in sorted(left) if re.fullmatch(pattern, name)}
        if (made := chart(title, own, unit)) is not None:
            found.append(made)
    rest = (chart(name, {name: curve}) for name, curve in left.items())
    return [*found, *(each for each in rest if each is not None)]


def chart(
    title: str, curves: Mapping[str, Curve], unit: str = "", *, points: int = POINTS
) -> PageChart | None:
    """One chart of curves by name, each of so many points at most; None where no value is
    known."""
    known = {
        name: dict(spread(list(curve.items()), points))
        for name, curve in curves.items()
        if _has(curve)
    }
    if not known:
        return None
    chosen = spread(list(known), LINES)
    steps = sorted({step for name in chosen for step in known[name]})
    lines = [Line(name, [_short(known[name].get(step)) for step in steps]) for name in chosen]
    note = f"{len(chosen)} of {len(known)} are shown" if len(chosen) < len(known) else ""
    return PageChart(title, unit, steps, lines=lines, note=note)


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of some values, evenly over them, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _has(curve: Curve) -> bool:
    return any(value is not None for value in curve.values())


def _short(value: float | None) -> float | None:
    """With as many digits as can be seen."""
    return None if value is None else float(f"{value:.6g}")
