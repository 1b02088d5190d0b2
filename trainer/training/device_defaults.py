"""What `auto` of run.channels_last and run.compile comes to, by the backbone, the device and the
length of the run; and the sentences of the plan about it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import nn

from trainer.backbones.backbone import Backbone
from trainer.config.schema import Recipe
from trainer.kernels.softmax import HALF

# a block that is compiled takes up to a quarter less time, and compiling takes one to three
# minutes: https://docs.pytorch.org/devlogs/inductor/2026-05-11-torch-compile-and-diffusers/
PAYS_AFTER = 3000  # forward and backward passes


def stores_channels_last(recipe: Recipe, backbone: Backbone, device: torch.device) -> bool:
    """Whether the denoiser's convolutions get their channels last in memory. auto: on CUDA in half
    precision, whose tensor cores want it so, where there are convolutions over neighbours beside
    the first layer, as in a U-Net. On a CPU it changes nothing (`python bench/peers.py --only
    layout`)."""
    asked = recipe.run.channels_last
    if asked != "auto":
        return asked
    if recipe.run.shards:
        return False
    return device.type == "cuda" and backbone.computes_in in HALF and _convolves(backbone.denoiser)


def _convolves(denoiser: nn.Module) -> bool:
    """Whether more convolutions look at neighbours than the one that makes patches of a picture."""
    found = [m for m in denoiser.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    return len(found) > 1


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Whether the denoiser's blocks are compiled. auto: see `why_uncompiled`."""
    asked = recipe.run.compile
    return why_uncompiled(recipe, device) is None if asked == "auto" else asked


def why_uncompiled(recipe: Recipe, device: torch.device) -> str | None:
    """Why auto compiles nothing, or None where it does: on CUDA with triton, in a run that is long
    enough to get the time of compiling back and whose pictures have one size, since every size is
    compiled by itself."""
    run = recipe.run
    if run.shards:
        return f"run.strategy={run.strategy} shards what would be compiled"
    if device.type != "cuda":
        return "no CUDA GPU, and on a CPU compiling takes longer than most runs get back"
    if find_spec("triton") is None:
        return "torch compiles for a GPU by triton, which is not installed"
    if getattr(recipe.data, "buckets", 0):
        return "every size of data.buckets would be compiled by itself"
    if (passes := run.steps * run.accumulate) < PAYS_AFTER:
        return f"{passes} passes are fewer than the {PAYS_AFTER} after which compiling pays"
    return None


def auto_lines(recipe: Recipe, backbone: Backbone, device: torch.device) -> Iterator[str]:
    """For a user: what the automatic choices are, where they change anything or might have."""
    run = recipe.run
    if run.compile == "auto":
        why = why_uncompiled(recipe, device)
        if why is None:
            yield (
                "run.compile=auto: blocks are compiled, so the first steps take minutes; "
                "run.compile=false starts at once"
            )
        elif device.type == "cuda":
            yield f"run.compile=auto: not compiled: {why}"
    if run.channels_last == "auto" and stores_channels_last(recipe, backbone, device):
        yield "run.channels_last=auto: convolutions have their channels last in memory"
