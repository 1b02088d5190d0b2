"""How much memory a run takes, part by part, before it starts, and whether this machine has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from trainer.backbones.backbone import Backbone
from trainer.backbones.device import Placement
from trainer.common.main_memory import free_memory
from trainer.config.optimisers import OPTIMISERS
from trainer.config.schema import Recipe
from trainer.methods.apply import Plan
from trainer.ops.adapters.nf4 import numel, scales
from trainer.training.plan_report import saved_bytes, size

FP32 = 4  # bytes of a value
LESS = (
    "it needs less with run.gradient_checkpointing=true, run.precision=bf16, a smaller "
    "run.resolution or run.batch_size, or methods.nf4={}"
)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a training step.

    parts: the weights of each part of the pipeline, in the precision they are held in; state: the
    gradients, moments and EMA of what trains; saved: what one forward keeps for the backward.
    loading: main memory while the weights are read, which is in fp32.
    """

    parts: Mapping[str, int]
    state: int
    saved: int
    loading: int

    @property
    def peak(self) -> int:
        return sum(self.parts.values()) + self.state + self.saved


def memory_of(recipe: Recipe, backbone: Backbone, plan: Plan) -> Memory:
    """The estimate for a recipe whose methods have been applied. What one forward saves is counted
    with fake tensors, the rest from shapes."""
    named = {backbone.denoiser_name: backbone.denoiser, **backbone.text_encoders}
    named |= {"vae": backbone.vae, "extras": backbone.extras}
    kept = OPTIMISERS[recipe.optim.name].moments + (recipe.optim.ema is not None)
    rows = recipe.run.batch_size // (recipe.run.devices * recipe.run.nodes)
    return Memory(
        parts={name: held for name, part in named.items() if (held := _held(part))},
        state=round(plan.trained_bytes * (1 + kept)),
        saved=saved_bytes(recipe, backbone, rows),
        loading=FP32 * sum(map(numel, backbone.parameters())),
    )


def _held(part: nn.Module) -> int:
    stored = [piece for value in part.parameters() for piece in (value, *scales(value))]
    return sum(piece.numel() * piece.element_size() for piece in stored)


def memory_lines(memory: Memory, placement: Placement) -> Iterator[str]:
    """Sentences for a user: what takes how much, and whether it fits here."""
    parts = [f"{name} {size(held)}" for name, held in memory.parts.items()]
    parts += [f"gradients and optimiser {size(memory.state)}"]
    parts += [f"kept for the backward {size(memory.saved)}"]
    yield f"memory: {', '.join(parts)}: {size(memory.peak)} in all at the peak"
    yield f"loading takes {size(memory.loading)} of main memory, where the weights are read in fp32"
    yield from _fits(memory, placement)


def _fits(memory: Memory, placement: Placement) -> Iterator[str]:
    main, on_cpu = free_memory(), placement.device.type != "cuda"
    needed = max(memory.loading, memory.peak) if on_cpu else memory.loading
    if main is not None:
        yield _verdict("this machine", main, needed, advice=on_cpu)
    if not on_cpu:
        free = torch.cuda.mem_get_info(placement.device)[0]
        yield _verdict(f"{placement.device}", free, memory.peak, advice=True)


def _verdict(what: str, free: int, needed: int, *, advice: bool) -> str:
    if needed <= free:
        return f"{what} has {size(free)} free: it fits"
    more = f"; {LESS}" if advice else ""
    return f"{what} has {size(free)} free, and {size(needed)} are needed: it does not fit{more}"
