"""What a sampled picture was made of, as facts for its file (`media/made_by.py`)."""

from __future__ import annotations

from typing import Any

import torch

from trainer.backbones.backbone import Backbone
from trainer.backbones.solvers import SOLVERS
from trainer.common.paths import bare_name
from trainer.common.version import name_and_version
from trainer.diffusion.sampling_settings import Sampling

# by the class of the backbone's own scheduler, as UIs call them
OWN = {
    "DDIMScheduler": "DDIM",
    "CogVideoXDDIMScheduler": "DDIM",
    "FlowMatchEulerDiscreteScheduler": "Euler",
}


def made_of(
    backbone: Backbone, settings: Sampling, *, prompt: str, seed: int, **more: Any
) -> dict[str, Any]:
    """The facts of one picture or clip; more: further ones, as of the adapter. What is None is left
    out."""
    settings = settings.on(embeds=backbone.embeds_guidance)
    height, width = settings.size or (backbone.resolution, backbone.resolution)
    own, solver = backbone.scheduler_class.__name__, settings.sampler
    facts = {
        "prompt": prompt,
        "negative": settings.negative if settings.guided and settings.negative else None,
        "seed": seed,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "true_guidance": settings.true_guidance if settings.true_guidance != 1 else None,
        "temporal_guidance": settings.temporal_guidance
        if settings.temporal_guidance != 1
        else None,
        "condition_guidance": settings.condition_guidance,
        "sampler": OWN.get(own, own) if solver is None else SOLVERS[solver].title,
        "size": f"{width}x{height}",
        "frames": settings.frames if settings.frames > 1 else None,
        "block": settings.blocks.size if settings.blocks else None,
        "overlap": settings.blocks.overlap if settings.blocks else None,
        "fps": settings.fps,
        "backbone": bare_name(backbone.name),
        "device": backbone.device.type,
        "computes_in": str(backbone.computes_in).removeprefix("torch."),
        "version": name_and_version(),
        **more,
    }
    return {key: value for key, value in facts.items() if value is not None}


def last_bits(backbone: Backbone, settings: Sampling) -> dict[str, Any]:
    """What the last bits of a picture depend on beside its settings, as facts too."""
    threads = {"threads": torch.get_num_threads()} if backbone.device.type == "cpu" else {}
    return {"torch": torch.__version__, "scheduler": settings.sampler, **threads}
