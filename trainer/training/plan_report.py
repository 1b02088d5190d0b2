"""Reports of the plan for users: the sites of each method, the trained parameters, the size of the
adapter, peak memory, and the attention back ends that were used."""

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

from trainer.attention.condition import INTEGERS, Condition
from trainer.backbones.backbone import Backbone
from trainer.backbones.device import is_one_number
from trainer.config.schema import Recipe
from trainer.methods.apply import Plan
from trainer.methods.method import Method
from trainer.ops.adapters.nf4 import scales


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


def saved_bytes(recipe: Recipe, backbone: Backbone, rows: int) -> int:
    """Bytes that one training forward of the denoiser saves for its backward; each storage counts
    once."""
    side = (recipe.run.resolution or backbone.resolution) // backbone.divisor
    seen: dict[int, int] = {}
    keep: list[Tensor] = []  # a freed storage could give its id to the next one

    def count(value: Tensor) -> Tensor:
        keep.append(value)
        seen[id(value.untyped_storage())] = value.untyped_storage().nbytes()
        return value

    denoiser = backbone.denoiser
    real = {
        name: (value.detach(), value.requires_grad)
        for name, value in denoiser.named_parameters()
        if not scales(value)  # 4-bit weights stay real: fake ones would lose their scales
    }
    real |= {name: (value, False) for name, value in denoiser.named_buffers()}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {
            name: _fake(mode, value).requires_grad_(trains)
            for name, (value, trains) in real.items()
        }
        own = {id(value.untyped_storage()) for value in fakes.values()}
        inputs = _empty_inputs(backbone, rows, side)
        with (
            torch.autograd.graph.saved_tensors_hooks(count, lambda value: value),
            backbone.computing(),
        ):
            functional_call(denoiser, fakes, args=(), kwargs=inputs)
    return sum(size for storage, size in seen.items() if storage not in own)


def _fake(mode: FakeTensorMode, value: Tensor) -> Tensor:
    """A fake of a parameter, laid out as one that was read. To be called inside the mode."""
    if is_one_number(value):
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    return mode.from_tensor(value)


def _empty_inputs(backbone: Backbone, rows: int, side: int) -> Any:
    """What the denoiser is called with, for `rows` latents of `side`; the values are arbitrary."""
    device = backbone.device
    x_t = torch.empty((rows, backbone.latent_channels, side, side), device=device)
    t = torch.zeros(rows, device=device)
    text = {
        name: torch.zeros(
            (rows, *shape), device=device, dtype=torch.long if name in INTEGERS else None
        )
        for name, shape in backbone.text_shapes.items()
    }
    return backbone.inputs(x_t, t, Condition(**text))


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
