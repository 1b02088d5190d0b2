"""Which adapters `merge` can join: those of Custom Diffusion, of the same options, on one
backbone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trainer.backbones.backbone import Backbone
from trainer.runs.adapter import check_backbone

ALLOWED = {"selective", "new_token"}
Loaded = tuple[Backbone, dict[str, Any]]  # the adapted model, and the recipe


def check_mergeable(paths: Sequence[Path], models: Sequence[Loaded]) -> None:
    """Checks adapters against the first of them.

    Raises:
        ValueError: one was trained with other methods or options, or on another backbone.
    """
    first = models[0]
    for path, loaded in zip(paths, models, strict=True):
        _refuse_others(path, loaded[1], first[1])
        other = f"adapter={paths[0]}"
        check_backbone(path, loaded[0].identity(), first[0].identity(), other=other)
        if loaded[0].target != first[0].target:
            raise ValueError(
                f"adapter={path} predicts {loaded[0].target}, {other} {first[0].target}; only "
                "adapters of one objective can be merged"
            )
        if loaded[0].max_tokens != first[0].max_tokens:
            raise ValueError(
                f"adapter={path} reads {loaded[0].max_tokens} tokens of a prompt, {other} "
                f"{first[0].max_tokens}; only adapters of one text.max_tokens can be merged"
            )
        _check_same_weights((paths[0], path), first, loaded)


def _stored(path: Path) -> list[str]:
    """The names of an adapter's tensors."""
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _check_same_weights(paths: tuple[Path, Path], first: Loaded, second: Loaded) -> None:
    """Refuses adapters of two backbones of equal shapes: what they did not train must be equal.

    Raises:
        ValueError: names both.
    """
    if second[0] is first[0]:
        return
    one, other = paths
    ours, theirs = (dict(model.named_parameters()) for model, _ in (first, second))
    trained = {name for path in paths for name in _stored(path)}
    for name, value in ours.items():
        if name not in trained and not torch.equal(value, theirs[name]):
            raise ValueError(
                f"adapter={other} was trained on backbone {second[1]['backbone']} and "
                f"adapter={one} on {first[1]['backbone']}, whose {name} differ; only adapters of "
                "one backbone can be merged"
            )


def _refuse_others(path: Path, tree: dict[str, Any], first: dict[str, Any]) -> None:
    used = {name for name, options in tree["methods"].items() if options is not None}
    if used != ALLOWED:
        raise ValueError(
            f"adapter={path} was trained with {', '.join(sorted(used))}; only Custom Diffusion's "
            "selective and new_token merge in closed form"
        )
    own, others = (_options(each) for each in (tree, first))
    if own != others:
        raise ValueError(
            f"adapter={path}: its methods.selective differs from that of the first adapter; all "
            "adapters must have trained the same layers"
        )
    if set(own.get("projections", ("k", "v"))) - {"k", "v"}:
        raise ValueError(
            f"adapter={path}: the closed form is for k and v, which read the text; it trained "
            f"{own['projections']}"
        )
    if "cross" not in own["sites"]:
        raise ValueError(
            f"adapter={path}: the closed form is for cross-attention, not {own['sites']!r}"
        )


def _options(tree: dict[str, Any]) -> dict[str, Any]:
    """Those of `selective`; without sites it trains cross-attention, where there is any."""
    options: dict[str, Any] = tree["methods"]["selective"]
    return {**options, "sites": options.get("sites") or "cross"}
