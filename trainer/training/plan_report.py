"""The plan as people read it: what each method touched, what trains, how large the adapter gets,
memory at the peak, and what really ran."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from trainer.attention.condition import Condition
from trainer.backbones.backbone import Backbone
from trainer.config.schema import Recipe
from trainer.methods.apply import Plan
from trainer.methods.method import Method
from trainer.ops.adapters.nf4 import scales


def describe_plan(
    recipe: Recipe, backbone: Backbone, plan: Plan, memory: int | None
) -> dict[str, Any]:
    """The plan as plain data, as it is kept in the run folder."""
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
    """Prints the table."""
    table = Table(title=f"{plan['recipe']} on {plan['backbone']}", title_justify="left")
    for column in ("method", "kind", "options", "sites", "parameters trained"):
        table.add_column(
            column, justify="right" if column in ("sites", "parameters trained") else "left"
        )
    for name, edit in plan["methods"].items():
        options = ", ".join(
            f"{key}={escape(_short(value))}" for key, value in methods[name].model_dump().items()
        )
        table.add_row(
            name, edit["kind"], options, str(len(edit["sites"])), f"{edit['parameters']:,}"
        )
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
    (folder / "plan.json").write_text(json.dumps(plan, indent=1), encoding="utf-8")


def report_backends(plan: Plan, folder: Path, console: Console) -> None:
    """Prints what methods say really ran at their sites, and adds it to the kept plan as
    `methods.<name>.ran`, site by site. Before the first batch nothing has."""
    told = {name: edit.report() for name, edit in plan.edits.items() if edit.report is not None}
    if not told:
        return
    kept = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    for name, sites in told.items():
        kept["methods"][name]["ran"] = {site: list(what) for site, what in sites.items()}
        alike: dict[str, list[str]] = {}
        for site, what in sites.items():
            alike.setdefault(" and ".join(what), []).append(site)
        for what, names in alike.items():
            where = f"all {len(names)} sites" if len(alike) == 1 else ", ".join(names)
            line = f"methods.{name}: {what} ran at {where}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    save_plan(kept, folder)


def peak_memory(recipe: Recipe, backbone: Backbone, plan: Plan) -> int:
    """Bytes at the peak of a training step on one device, estimated.

    Weights, gradients, two AdamW moments and EMA of what trains, and what one forward saves for the
    backward, counted on fake tensors that hold no memory.
    """
    stored = [part for value in backbone.parameters() for part in (value, *scales(value))]
    weights = sum(part.numel() * part.element_size() for part in stored)
    state = plan.trained_bytes * (3 + (recipe.optim.ema is not None))
    rows = recipe.run.batch_size // (recipe.run.devices * recipe.run.nodes)
    return weights + state + saved_bytes(recipe, backbone, rows)


def saved_bytes(recipe: Recipe, backbone: Backbone, rows: int) -> int:
    """What one training forward of the denoiser keeps for its backward, each storage counted
    once."""
    side = (recipe.run.resolution or backbone.resolution) // backbone.divisor
    seen: dict[int, int] = {}
    keep: list[Tensor] = []  # a storage that is freed could lend its address to the next

    def count(value: Tensor) -> Tensor:
        keep.append(value)
        seen[id(value.untyped_storage())] = value.untyped_storage().nbytes()
        return value

    denoiser = backbone.denoiser
    real = {
        name: (value.detach(), value.requires_grad)
        for name, value in denoiser.named_parameters()
        if not scales(value)  # 4-bit weights stay real: a fake one would lose its scales
    }
    real |= {name: (value, False) for name, value in denoiser.named_buffers()}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {
            name: mode.from_tensor(value).requires_grad_(trains)
            for name, (value, trains) in real.items()
        }
        own = {id(value.untyped_storage()) for value in fakes.values()}
        width, device = backbone.text_width, backbone.device
        text = Condition(torch.empty(rows, backbone.text_length, width, device=device))
        inputs = backbone.inputs(
            torch.empty(rows, backbone.latent_channels, side, side, device=device),
            torch.zeros(rows, device=device),
            text,
        )
        with (
            torch.autograd.graph.saved_tensors_hooks(count, lambda value: value),
            backbone.computing(),
        ):
            functional_call(denoiser, fakes, (), inputs)
    return sum(size for storage, size in seen.items() if storage not in own)


def size(count: int) -> str:
    """Bytes for people: 0.7 MB, 3.4 GB."""
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
