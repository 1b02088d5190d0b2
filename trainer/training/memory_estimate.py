"""How much memory a run takes, part by part, before it starts, and whether this machine has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from trainer.backbones.backbone import Backbone
from trainer.backbones.device import Placement
from trainer.backbones.four_bits import numel, scales
from trainer.backbones.held_layers import FP8, LAYERS
from trainer.backbones.resting import SAME_MEMORY
from trainer.common.main_memory import free_memory
from trainer.config.optimisers import OPTIMISERS
from trainer.config.partners import pictures_change, text_trains
from trainer.config.schema import Recipe
from trainer.methods.apply import Plan
from trainer.training.plan_report import size
from trainer.training.step_memory import step_bytes

FP32 = 4  # bytes of a value
FP8_DENOISER = "run.base_precision.denoiser=fp8"


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step.

    parts: the weights of each part of the pipeline, in the precision they are held in; state: the
    gradients, moments and EMA of what trains; saved: what a step calculates and keeps until it is
    used. loading: main memory while the weights are read; in_fp32: whether that is in fp32.
    resting: the parts that leave a device with memory of its own, see `resting.py`. less: options
    with which the recipe needs less.
    """

    parts: Mapping[str, int]
    state: int
    saved: int
    loading: int
    in_fp32: bool = True
    resting: tuple[str, ...] = ()
    less: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Of all parts together, as in main memory."""
        return sum(self.parts.values()) + self.state + self.saved

    @property
    def on_device(self) -> int:
        """Of a device with memory of its own: of a step without the parts that rest, or of a
        preview, for which they come back beside the gradients and moments; the greater."""
        weights = sum(self.parts.values())
        away = sum(self.parts.get(name, 0) for name in self.resting)
        return max(weights + self.state, weights - away + self.state + self.saved)

    def at(self, device: torch.device) -> int:
        return self.peak if device.type in SAME_MEMORY else self.on_device


def memory_of(recipe: Recipe, backbone: Backbone, plan: Plan) -> Memory:
    """The estimate for a recipe whose methods have been applied. What one forward saves is counted
    with fake tensors, the rest from shapes."""
    named = {backbone.denoiser_name: backbone.denoiser, **backbone.text_encoders}
    named |= {"vae": backbone.vae, "extras": backbone.extras}
    kept = OPTIMISERS[recipe.optim.name].moments + (recipe.optim.ema is not None)
    rows = recipe.run.batch_size // (recipe.run.devices * recipe.run.nodes)
    as_stored = _read_as_stored(recipe, backbone)
    return Memory(
        parts={name: held for name, part in named.items() if (held := _held(part))},
        state=round(plan.trained_bytes * (1 + kept)),
        saved=step_bytes(recipe, backbone, rows),
        loading=sum(_read(part, name in as_stored) for name, part in named.items()),
        in_fp32=not as_stored,
        resting=_resting(recipe, backbone),
        less=tuple(_less(recipe, backbone)),
    )


def _resting(recipe: Recipe, backbone: Backbone) -> tuple[str, ...]:
    """The parts that leave the device while the denoiser trains, as far as a recipe tells."""
    known = not recipe.data.captions_inside
    text = recipe.run.cache_text and known and text_trains(recipe) is None
    pictures = recipe.run.cache_latents and pictures_change(recipe.data) is None
    return (*(backbone.text_encoders if text else ()), *(("vae",) if pictures else ()))


def _less(recipe: Recipe, backbone: Backbone) -> Iterator[str]:
    """What a user can set, and has not set, for less memory."""
    if not recipe.run.gradient_checkpointing:
        yield "run.gradient_checkpointing=true"
    if backbone.computes_in == torch.float32:
        yield "run.precision=bf16"
    yield "a smaller run.resolution"
    if recipe.run.batch_size > 1:
        yield "a smaller run.batch_size"
    layers = [each for each in backbone.denoiser.modules() if isinstance(each, LAYERS)]
    held = {each.weight.dtype for each in layers if not each.weight.requires_grad}
    small = any(dtype.itemsize == 1 for dtype in held)  # fp8, or nf4, which excludes the other
    if not small and any(dtype.is_floating_point for dtype in held):
        yield FP8_DENOISER
        yield "methods.nf4={}"


def _read_as_stored(recipe: Recipe, backbone: Backbone) -> list[str]:
    """The parts that are read as they are stored, text encoders in what the denoiser is: those
    whose layers are held so or in less, unless a method calculates with weights."""
    stored = backbone.published
    if stored == torch.float32 or any(m.reads_weights for m in recipe.methods.values()):
        return []
    named = {backbone.denoiser_name: backbone.denoiser, **backbone.text_encoders}
    text = backbone.text_encoders if _in_four_bits(recipe) else ()
    return [name for name, own in named.items() if name in text or {stored, FP8} & _held_in(own)]


def _in_four_bits(recipe: Recipe) -> bool:
    """Whether text encoders are packed after they are read."""
    return recipe.run.base_precision.get("text_encoders") == "nf4"


def _held_in(part: nn.Module) -> set[torch.dtype]:
    return {layer.weight.dtype for layer in part.modules() if isinstance(layer, LAYERS)}


def _read(part: nn.Module, as_stored: bool) -> int:
    """Bytes of a part while it is read."""
    layers = {id(v) for x in part.modules() if isinstance(x, LAYERS) for v in x.parameters(False)}
    weights = sum(
        numel(value) * (FP32 // 2 if as_stored and id(value) in layers else FP32)
        for value in part.parameters()
    )
    return weights + _tables(part)


def _held(part: nn.Module) -> int:
    stored = [piece for value in part.parameters() for piece in (value, *scales(value))]
    return sum(piece.numel() * piece.element_size() for piece in stored) + _tables(part)


def _tables(part: nn.Module) -> int:
    """Bytes of buffers, as the table of positions of SD 3.5 medium, 906 MB."""
    return sum(value.numel() * value.element_size() for value in part.buffers())


def memory_lines(memory: Memory, placement: Placement) -> Iterator[str]:
    """Sentences for a user: what takes how much, and whether it fits here."""
    parts = [f"{name} {size(held)}" for name, held in memory.parts.items()]
    parts += [f"gradients and optimiser {size(memory.state)}"]
    parts += [f"kept for the backward {size(memory.saved)}"]
    yield f"memory: {', '.join(parts)}: {size(memory.peak)} in all at the peak"
    if placement.device.type not in SAME_MEMORY and memory.resting:
        yield (
            f"{', '.join(memory.resting)} leave {placement.device} while the denoiser trains, and "
            f"come back for previews: {size(memory.on_device)} there at the peak"
        )
    how = "in fp32" if memory.in_fp32 else "as they are stored"
    yield f"loading takes {size(memory.loading)} of main memory, where the weights are read {how}"
    yield from _fits(memory, placement)


def _fits(memory: Memory, placement: Placement) -> Iterator[str]:
    main, on_cpu = free_memory(), placement.device.type != "cuda"
    needed = max(memory.loading, memory.peak) if on_cpu else memory.loading
    refused = FP8_DENOISER if placement.device.type == "mps" else None
    less = [option for option in memory.less if option != refused]
    if main is not None:
        yield _verdict("this machine", main, needed, less=less if on_cpu else ())
    if not on_cpu:
        free = torch.cuda.mem_get_info(placement.device)[0]
        yield _verdict(f"{placement.device}", free, memory.on_device, less=less)


def _verdict(what: str, free: int, needed: int, *, less: Sequence[str]) -> str:
    if needed <= free:
        return f"{what} has {size(free)} free: it fits"
    more = f"; it needs less with any of {', '.join(less)}" if less else ""
    return f"{what} has {size(free)} free, and {size(needed)} are needed: it does not fit{more}"
