"""The noise schedules of pretrained models, read from their scheduler files."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from trainer.backbones.folder_check import (
    FLOW,
    PREDICTION_TYPES,
    check_flow_or_vp,
    check_prediction,
    is_flow,
)
from trainer.backbones.noise_levels import NoiseLevels, shift_of
from trainer.backbones.pipeline_folder import SCHEDULER
from trainer.backbones.solvers import check_solver


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
    return flow_scheduler(config)


def flow_scheduler(config: Mapping[str, Any]) -> FlowMatchEulerDiscreteScheduler:
    """Euler steps on a flow path, whatever solver the folder names."""
    euler = config.get("_class_name") == FlowMatchEulerDiscreteScheduler.__name__
    own = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    if not euler:  # a solver of flows; its other options are its own
        steps = config.get("num_train_timesteps", 1000)
        config = {"num_train_timesteps": steps, "shift": config.get("flow_shift", 1.0)}
    return FlowMatchEulerDiscreteScheduler(
        **{key: value for key, value in config.items() if key in own}
    )


def set_levels(scheduler: Any, steps: int, *, levels: NoiseLevels, device: Any) -> None:
    """Sets a scheduler's timesteps for so many steps. Solvers other than Euler have levels of their
    own, and their shift from `with_solver`."""
    given: dict[str, Any] = {}
    euler: Any = scheduler if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else None
    if euler is not None:
        if levels.sigmas is not None:
            given["sigmas"] = list(levels.sigmas)
        if euler.config.use_dynamic_shifting:
            given["mu"] = levels.mu
    scheduler.set_timesteps(steps, device=device, **given)


def with_solver(own: Any, name: str, *, key: str = "sampler", mu: float | None = None) -> Any:
    """Another solver, one of `SOLVERS`, of the path and noise levels that a scheduler describes: as
    `from_config` of its class makes it of the scheduler's config. key: names it in errors; mu: of a
    flow whose shift depends on the size, see `NoiseLevels`.

    Raises:
        ValueError: this path or target has no such solver, or the solver does not know the path.
    """
    flow = isinstance(own, FlowMatchEulerDiscreteScheduler)
    target = None if flow else PREDICTION_TYPES[own.config.prediction_type]
    solver = check_solver(name, flow, target, key=key)
    made = getattr(diffusers, str(solver.flow if flow else solver.vp))
    if not flow:
        if own.config.get("rescale_betas_zero_snr") and not _takes(made, "rescale_betas_zero_snr"):
            raise ValueError(
                f"{key}={name} does not know the noise levels of this backbone, whose last one is "
                "all noise (rescale_betas_zero_snr); give ddim, euler or dpmpp_2m"
            )
        return made.from_config(own.config, **solver.options)
    if isinstance(own, made):
        return own
    steps, shift = own.config.num_train_timesteps, shift_of(own.config, mu)
    if not _takes(made, "use_flow_sigmas"):
        return made(num_train_timesteps=steps, shift=shift)
    return made(
        num_train_timesteps=steps,
        prediction_type=FLOW,
        use_flow_sigmas=True,
        flow_shift=shift,
        **solver.options,
    )


def _takes(scheduler: type, option: str) -> bool:
    return option in inspect.signature(scheduler.__init__).parameters  # type: ignore[misc]
