"""Reports of the plan for users: the sites of each method, the trained parameters, the size of the
adapter, peak memory, and the attention back ends that were used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trainer.backbones.backbone import Backbone
from trainer.config.schema import Recipe
from trainer.methods.apply import Plan
from trainer.methods.method import Method


def describe_plan(
    recipe: Recipe, backbone: Backbone, plan: Plan, memory: int | None
) -> dict[str, Any]:
    """The plan as plain data for the run folder. memory: bytes at the peak, or None."""
    return {
        "recipe": recipe.name,
        "backbone": recipe.backbone_name,
        "methods": {
            name: {
                "kind": recipe.methods[name].kind,
                "sites": list(edit.sites),
                "parameters": _count(backbone, edit.trains),
            }
            for name, edit in plan.edits.items()
        },
        "trained": plan.trained,
        "total": plan.total,
        "adapter_bytes": plan.trained_bytes,
        "peak_memory_bytes": memory,
        "trains": list(plan.names),
    }


def show_plan(plan: Mapping[str, Any], methods: Mapping[str, Method], console: Console) -> None:
    """Prints the plan as a table."""
    table = Table(title=f"{plan['recipe']} on {plan['backbone']}", title_justify="left")
    for column in ("method", "kind", "options", "sites", "parameters trained"):
        table.add_column(
            column, justify="right" if column in ("sites", "parameters trained") else "left"
        )
    for name, edit in plan["methods"].items():
        options = ", ".join(
            f"{key}={escape(_short(value))}" for key, value in methods[name].model_dump().items()
        )
        cells = (name, edit["kind"], options, str(len(edit["sites"])), f"{edit['parameters']:,}")
        table.add_row(*cells)
    console.print(table)
    share = 100 * plan["trained"] / plan["total"]
    console.print(
        f"trains {plan['trained']:,} of {plan['total']:,} parameters ({share:.2f} %); adapter "
        f"{size(plan['adapter_bytes'])}"
        + (
            f"; peak memory about {size(plan['peak_memory_bytes'])}"
            if plan["peak_memory_bytes"]
            else ""
        ),
        highlight=False,
    )


def save_plan(plan: Mapping[str, Any], folder: Path) -> None:
    """Writes `plan.json`."""
    (folder / "plan.json").write_text(json.dumps(plan, indent=1), encoding="utf-8")


def report_backends(plan: Plan, folder: Path, console: Console) -> None:
    """Prints the back ends that methods used at their sites, and adds them to `plan.json` as
    `methods.<name>.ran`, site by site. They are known after the first batch."""
    reports = {name: edit.report() for name, edit in plan.edits.items() if edit.report is not None}
    if not reports:
        return
    kept = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    for name, sites in reports.items():
        kept["methods"][name]["ran"] = {site: list(what) for site, what in sites.items()}
        by_backend: dict[str, list[str]] = {}
        for site, what in sites.items():
            by_backend.setdefault(" and ".join(what), []).append(site)
        for what, names in by_backend.items():
            where = f"all {len(names)} sites" if len(by_backend) == 1 else ", ".join(names)
            line = f"methods.{name}: {what} ran at {where}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    save_plan(kept, folder)


def size(count: int) -> str:
    """A number of bytes in readable units, as 0.7 MB or 3.4 GB."""
    return (
        f"{count / 1e9:.1f} GB"
        if count >= 1e9
        else f"{count / 1e6:.1f} MB"
        if count >= 1e5
        else f"{count / 1e3:.1f} kB"
    )


def _count(backbone: Backbone, names: tuple[str, ...]) -> int:
    parameters = dict(backbone.named_parameters())
    return sum(parameters[name].numel() for name in names)


def _short(value: Any) -> str:
    return (
        "[" + ", ".join(map(str, value)) + "]" if isinstance(value, (list, tuple)) else str(value)
    )
