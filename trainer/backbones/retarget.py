"""What the network predicts, and on which path noise is added, where training changes either from
what the backbone was published with: from then on sampling, validation and exports follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from trainer.backbones.backbone import Backbone
from trainer.backbones.folder_check import PREDICTION_TYPES

SCHEDULED = {target: name for name, target in PREDICTION_TYPES.items()}


def retarget(backbone: Backbone, objective: Mapping[str, Any]) -> None:
    """Makes a backbone predict `objective["target"]` on `objective["path"]`; what is None or absent
    stays as it is.

    Raises:
        ValueError: see `resolved`.
    """
    target, flow = resolved(backbone, objective)
    if flow and backbone.alphas_cumprod is not None:
        steps = int(backbone.scheduler_config["num_train_timesteps"])
        scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps)
        backbone.scheduler_class = type(scheduler)
        backbone.scheduler_config = dict(scheduler.config)
        backbone.alphas_cumprod = None
    if not flow:
        backbone.scheduler_config["prediction_type"] = SCHEDULED[target]
    backbone.target = target


def resolved(backbone: Backbone, objective: Mapping[str, Any]) -> tuple[str, bool]:
    """The target that an objective asks of a backbone, and whether on the flow path.

    Raises:
        ValueError: a variance-preserving path for a backbone on the flow path, or a target that no
            sampler of the path takes.
    """
    target, path = objective.get("target"), objective.get("path")
    flow = backbone.alphas_cumprod is None
    if path == "vp" and flow:
        raise ValueError(
            f"objective.path=vp: {backbone.name} was trained on the flow path and says nothing of "
            "another; leave objective.path out"
        )
    moved = path == "flow" and not flow
    if target is None:
        target = "flow" if moved else backbone.target
    flow = flow or moved
    known = ("flow",) if flow else tuple(SCHEDULED)
    if target not in known:
        where = "flow" if flow else "variance-preserving"
        raise ValueError(
            f"objective.target={target}: samplers on the {where} path take {', '.join(known)}; "
            "give one of these, or leave objective.target out"
        )
    return target, flow


def is_retargeted(backbone: Backbone) -> bool:
    """Whether the network predicts something else, or on another path, than it was published
    with."""
    return (backbone.target, backbone.alphas_cumprod is None) != backbone.published_target
