"""The noise schedules of pretrained models, read from their scheduler files."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from trainer.backbones.folder_check import FLOW, check_flow_or_vp, check_prediction, is_flow
from trainer.backbones.folder_facts import check_solver
from trainer.backbones.pipeline_folder import SCHEDULER


def vp_scheduler(config: dict[str, Any], where: Path) -> DDIMScheduler:
    """The DDIM scheduler of the training path that any of diffusers' VP schedulers describes.

    An option that another scheduler's file leaves out has that class's default, not DDIM's: no
    clipping of latents, and a last step to the first alpha, as with PNDM.
    """
    check_prediction(config, where / SCHEDULER)
    if config.get("_class_name") != DDIMScheduler.__name__:
        config = {"clip_sample": False, "set_alpha_to_one": False} | config
    own = inspect.signature(DDIMScheduler.__init__).parameters
    return DDIMScheduler(**{key: value for key, value in config.items() if key in own})


def flow_or_vp(
    config: dict[str, Any], where: Path
) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """Euler steps on a flow path, DDIM on a VP one, whatever solver the folder names."""
    check_flow_or_vp(config, where / SCHEDULER)
    if not is_flow(config):
        return vp_scheduler(config, where)
    euler = config.get("_class_name") == FlowMatchEulerDiscreteScheduler.__name__
    own = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    if not euler:  # a solver of flows; its other options are its own
        steps = config.get("num_train_timesteps", 1000)
        config = {"num_train_timesteps": steps, "shift": config.get("flow_shift", 1.0)}
    return FlowMatchEulerDiscreteScheduler(
        **{key: value for key, value in config.items() if key in own}
    )


def with_solver(own: Any, name: str) -> Any:
    """Another solver, one of `SOLVERS`, of the path and noise levels that a scheduler describes.

    Raises:
        ValueError: this path has no such solver.
    """
    flow = isinstance(own, FlowMatchEulerDiscreteScheduler)
    check_solver(name, flow)
    if name == "dpmpp" and flow:
        return DPMSolverMultistepScheduler(
            num_train_timesteps=own.config.num_train_timesteps,
            prediction_type=FLOW,
            use_flow_sigmas=True,
            flow_shift=own.config.shift,
        )
    if flow:
        return own
    kinds: dict[str, Any] = {
        "ddim": DDIMScheduler,
        "euler": EulerDiscreteScheduler,
        "dpmpp": DPMSolverMultistepScheduler,
    }
    return kinds[name].from_config(own.config)
