"""Solvers of sampling by short names: the schedulers of diffusers that fit the noise path and the
target of a backbone. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from trainer.common.suggest import nearest

KARRAS = {"use_karras_sigmas": True}
NO_X0 = ("eps", "v")


@dataclass(frozen=True)
class Solver:
    """One scheduler of diffusers.

    title: as user interfaces call it; vp, flow: its class on a VP path and on the flow path, None
    where it has none; options: of the class, over those of the backbone's own scheduler; targets:
    what the network of a VP path may predict; needs: a package that the class needs, which is in an
    extra.
    """

    title: str
    vp: str | None = None
    flow: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("eps", "v", "x0")
    needs: str | None = None


MULTISTEP, SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
UNIPC, DEIS, SA = "UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler"
EULER, HEUN, LMS = "EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"
ANCESTRAL, FLOW_HEUN = "EulerAncestralDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
KDPM2, KDPM2_A = "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"
DPM_SDE, BROWNIAN = "DPMSolverSDEScheduler", "torchsde"
SDE = {"algorithm_type": "sde-dpmsolver++"}
PLMS = {"skip_prk_steps": True}  # as the scheduler files of Stable Diffusion have it

SOLVERS: dict[str, Solver] = {
    "ddim": Solver("DDIM", "DDIMScheduler"),
    "ddpm": Solver("DDPM", "DDPMScheduler"),
    "pndm": Solver("PLMS", "PNDMScheduler", options=PLMS, targets=NO_X0),
    "lms": Solver("LMS", LMS),
    "lms_karras": Solver("LMS Karras", LMS, options=KARRAS),
    "euler": Solver("Euler", EULER, flow="FlowMatchEulerDiscreteScheduler"),
    "euler_karras": Solver("Euler Karras", EULER, options=KARRAS),
    "euler_a": Solver("Euler a", ANCESTRAL, targets=NO_X0),
    "heun": Solver("Heun", HEUN, flow=FLOW_HEUN, targets=NO_X0),
    "heun_karras": Solver("Heun Karras", HEUN, options=KARRAS, targets=NO_X0),
    "dpm2": Solver("DPM2", KDPM2, targets=NO_X0),
    "dpm2_karras": Solver("DPM2 Karras", KDPM2, options=KARRAS, targets=NO_X0),
    "dpm2_a": Solver("DPM2 a", KDPM2_A, targets=NO_X0),
    "dpm2_a_karras": Solver("DPM2 a Karras", KDPM2_A, options=KARRAS, targets=NO_X0),
    "dpmpp": Solver("DPM++ 2M", MULTISTEP, flow=MULTISTEP),
    "dpmpp_2m": Solver("DPM++ 2M", MULTISTEP, flow=MULTISTEP),
    "dpmpp_2m_karras": Solver("DPM++ 2M Karras", MULTISTEP, options=KARRAS),
    "dpmpp_2m_sde": Solver("DPM++ 2M SDE", MULTISTEP, flow=MULTISTEP, options=SDE),
    "dpmpp_2m_sde_karras": Solver("DPM++ 2M SDE Karras", MULTISTEP, options=SDE | KARRAS),
    "dpmpp_sde": Solver("DPM++ SDE", DPM_SDE, targets=NO_X0, needs=BROWNIAN),
    "dpmpp_sde_karras": Solver(
        "DPM++ SDE Karras", DPM_SDE, options=KARRAS, targets=NO_X0, needs=BROWNIAN
    ),
    "dpmpp_2s": Solver("DPM++ 2S", SINGLESTEP, flow=SINGLESTEP),
    "dpmpp_2s_karras": Solver("DPM++ 2S Karras", SINGLESTEP, options=KARRAS),
    "deis": Solver("DEIS", DEIS, flow=DEIS),
    "deis_karras": Solver("DEIS Karras", DEIS, options=KARRAS),
    "unipc": Solver("UniPC", UNIPC, flow=UNIPC),
    "unipc_karras": Solver("UniPC Karras", UNIPC, options=KARRAS),
    "sa_solver": Solver("SA-Solver", SA, flow=SA),
}
DISTILLED = "is for networks distilled to a few steps, which are not trained here"
OTHER_PATH = "has a noise path of its own, on which no backbone here was trained"
UNFIT = {
    "lcm": DISTILLED, "tcd": DISTILLED, "flow_lcm": DISTILLED, "scm": DISTILLED,
    "consistency": DISTILLED, "edm": OTHER_PATH, "edm_euler": OTHER_PATH, "edm_dpmpp": OTHER_PATH,
    "ipndm": OTHER_PATH, "ve": OTHER_PATH, "unclip": OTHER_PATH, "vq": OTHER_PATH,
    "ddim_inverse": "goes from pictures to noise; source= inverts a clip",
    "repaint": "paints a masked part anew, which `sample` does not do",
}  # fmt: skip


def solver_names(flow: bool) -> list[str]:
    """The names of the solvers that a path has."""
    return [name for name, own in SOLVERS.items() if (own.flow if flow else own.vp)]


def check_solver(
    name: str, flow: bool, target: str | None = None, *, key: str = "sampler"
) -> Solver:
    """The solver of a name. key: names it in errors; target: what the network predicts, if known.

    Raises:
        ValueError: there is no such solver, or none for this path or target.
    """
    if name in UNFIT:
        raise ValueError(f"{key}={name} {UNFIT[name]}; there are: {', '.join(solver_names(flow))}")
    if name not in SOLVERS:
        raise ValueError(f"{key}={name}: no such solver{nearest(name, solver_names(flow))}")
    found = SOLVERS[name]
    if flow and found.flow is None:
        raise ValueError(
            f"{key}={name} is for backbones on a VP path, and this one was trained as a flow; "
            f"give {' or '.join(solver_names(flow))}, or null for its own"
        )
    if not flow and target is not None and target not in found.targets:
        raise ValueError(
            f"{key}={name} is for networks that predict {' or '.join(found.targets)}, and this one "
            f"predicts {target}; give ddim, euler or dpmpp_2m, or null for its own"
        )
    if found.needs is not None and find_spec(found.needs) is None:
        raise ValueError(
            f"{key}={name} needs {found.needs}: pip install 'attention-trainer[sde]'; or give "
            "dpmpp_2m_sde"
        )
    return found
