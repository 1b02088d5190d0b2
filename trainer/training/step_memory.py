"""What one training step takes beside weights, gradients and optimiser, counted with fake tensors:
no value is calculated, so that a step of a large model takes seconds and no memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from trainer.attention.condition import INTEGERS, Condition
from trainer.attention.context import StepContext, use
from trainer.attention.rows import Rows
from trainer.backbones.backbone import Backbone
from trainer.backbones.four_bits import scales
from trainer.backbones.gradient_checkpointing import Recompute, block_behind, feed_forward_parts
from trainer.backbones.held_layers import is_one_number
from trainer.config.schema import Recipe
from trainer.diffusion.guidance import COND
from trainer.training.adapt_backbone import recompute_of

CHECKPOINT = "_gradient_checkpointing_func"  # of modules of diffusers
# oneDNN copies what goes in and what comes out into a layout of its own, and back: 320 to 320
# channels on 128 x 128 take 23 MB for an output of 10 MB, 640 to 640 take 70 MB for 21 MB
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


def step_bytes(recipe: Recipe, backbone: Backbone, rows: int) -> int:
    """Bytes that a step of the denoiser takes at its peak with `rows` samples, pictures or clips as
    the data has them, beside its weights and the gradients of what trains.

    Without gradient checkpointing the peak is at the end of the forward, when all that the backward
    needs is there. With it a block calculates its own again in the backward, so that is run too.
    """
    ctx, x_t = _context(recipe, backbone, rows)
    run = recipe.run
    how = recompute_of(run) if run.gradient_checkpointing else None
    step = _Step(backbone.denoiser, how)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = _fakes(mode, step)
    assert ctx.condition is not None
    with use(ctx), backbone.calling(x_t, ctx.timestep):
        inputs = backbone.inputs(x_t, ctx.timestep, ctx.condition)
        known = [value.untyped_storage() for value in (*fakes.values(), *_tensors(inputs))]
        with mode, LivingTensors(known) as living, backbone.computing():
            given = tree_map(lambda each: _faked(mode, each), inputs)
            functional_call(step, fakes, args=(), kwargs=given)
            gradients = [value.grad for value in fakes.values() if value.grad is not None]
            return living.peak - sum(map(_bytes, gradients))


class _Step(nn.Module):
    """A forward of the denoiser, and its backward; while that runs, the denoiser has the parameters
    that the forward had."""

    def __init__(self, denoiser: nn.Module, how: Recompute | None) -> None:
        super().__init__()
        self.denoiser, self.how = denoiser, how

    def forward(self, **inputs: Any) -> None:
        with nullcontext() if self.how is None else self._again(self.how):
            output = self.denoiser(**inputs)
            if self.how is not None:
                given = [each for each in tree_leaves(output.sample) if each.requires_grad]
                torch.autograd.backward([each.float().sum() for each in given])

    @contextmanager
    def _again(self, how: Recompute) -> Iterator[None]:
        """What `how` says is calculated again by `_Again` inside."""
        kinds: set[Any] = set()

        def again(block: Any, *args: Any) -> Any:
            taken = how.feed_forward or how.takes(block)
            own = (*tree_leaves(args), *block_behind(block).parameters())
            if not taken or not any(map(_needs, own)):
                return block(*args)
            start = torch.empty(0, requires_grad=True)
            return _Again.apply(start, (kinds, how.offload), block, *args)

        changed: list[tuple[nn.Module, str, Any]]
        if how.feed_forward:
            parts = list(feed_forward_parts(self.denoiser))
            changed = [(each, "forward", partial(again, _Plain(each))) for each in parts]
        else:
            having = [each for each in self.denoiser.modules() if hasattr(each, CHECKPOINT)]
            changed = [(each, CHECKPOINT, again) for each in having]
        before = [getattr(each, name) for each, name, _ in changed]
        try:
            for each, name, function in changed:
                setattr(each, name, function)
            yield
        finally:
            for (each, name, _), function in zip(changed, before, strict=True):
                setattr(each, name, function)


class _Plain(nn.Module):
    """A feed-forward part as it runs without checkpointing."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any) -> Any:
        return type(self.part).forward(self.part, *args)


@dataclass(frozen=True)
class _Elsewhere:
    """A tensor that waits in main memory, as to its form."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    trains: bool

    def back(self) -> Tensor:
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        return made.requires_grad_(self.trains)


def _moved(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return _Elsewhere(value.shape, value.stride(), dtype=value.dtype, trains=value.requires_grad)


class _Again(torch.autograd.Function):
    """What checkpointing does with a block, once for each kind of block: for the last one, since
    one before it has less beside it. Of the others the gradients alone are there."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, how: tuple[set[Any], bool], block: Any, *args: Any) -> Any:
        (ctx.kinds, offload), ctx.block = how, block
        ctx.args = tree_map(_moved, args) if offload else args
        return block(*args)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        own, args = block_behind(ctx.block), tree_map(_leaf, ctx.args)
        ctx.args = ()  # autograd keeps this until all is done
        kind = type(own), *(value.shape for value in (*_tensors(args), *own.parameters()))
        if kind not in ctx.kinds:
            ctx.kinds.add(kind)
            with torch.enable_grad():
                pairs = zip(tree_leaves(ctx.block(*args)), given, strict=True)  # None is one too
            needed = [pair for pair in pairs if _needs(pair[0])]
            torch.autograd.backward([value for value, _ in needed], [grad for _, grad in needed])
        for value in (*own.parameters(), *_tensors(args)):
            if value.requires_grad and value.grad is None:
                value.grad = torch.empty_like(value)
        return None, None, None, *(value.grad if _needs(value) else None for value in args)


def _needs(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _leaf(value: Any) -> Any:
    """A tensor without the operations that made it."""
    if isinstance(value, _Elsewhere):
        return value.back()
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


def _tensors(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


class LivingTensors(TorchDispatchMode):
    """Counts the bytes that are alive of all that operations inside have made, and at the peak what
    one of them takes while it runs. known: storages that were there before."""

    def __init__(self, known: list[torch.UntypedStorage]) -> None:
        super().__init__()
        self.before = known  # a freed storage could give its id to a new one
        self.seen = {id(each) for each in known}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = _tensors(result)
        for value in made:
            self._made(value.untyped_storage())
        if func in CONVOLUTIONS:
            copied = [value for value in args if isinstance(value, Tensor)]
            self.peak = max(self.peak, self.now + sum(map(_bytes, (*copied, *made))))
        return result

    def _made(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self.seen:
            return
        self.seen.add(id(storage))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        freed = partial(self._freed, id(storage), storage.nbytes())
        weakref.finalize(storage, freed).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def _fakes(mode: FakeTensorMode, step: nn.Module) -> dict[str, Tensor]:
    """A fake of every parameter and buffer by its name."""
    real = {
        name: (value.detach(), value.requires_grad)
        for name, value in step.named_parameters()
        if not scales(value)  # 4-bit weights stay real: fake ones would lose their scales
    }
    real |= {name: (value, False) for name, value in step.named_buffers()}
    return {
        name: _fake(mode, value).requires_grad_(trains) for name, (value, trains) in real.items()
    }


def _fake(mode: FakeTensorMode, value: Tensor) -> Tensor:
    """A fake of a parameter, laid out as one that was read."""
    if is_one_number(value):
        shape = torch.empty(value.shape, dtype=value.dtype, device="meta")
        return FakeTensor(mode, shape, value.device)
    return mode.from_tensor(value)


def _faked(mode: FakeTensorMode, value: Any) -> Any:
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


def _context(recipe: Recipe, backbone: Backbone, samples: int) -> tuple[StepContext, Tensor]:
    """Of a step with so many samples, and their latents (b f, c, h, w). The values are arbitrary,
    those of masks 1: a family may ask how many tokens there are, which a fake mask does not tell.
    """
    device = backbone.device
    frames = backbone.clip_frames.latent(getattr(recipe.data, "frames", 1))
    side = (recipe.run.resolution or backbone.resolution) // backbone.divisor
    x_t = torch.zeros((samples * frames, backbone.latent_channels, side, side), device=device)
    whole = (*INTEGERS, "mask")  # as tokenizers give it
    text = {
        name: torch.ones(
            (samples, *shape), device=device, dtype=torch.long if name in whole else None
        )
        for name, shape in backbone.text_shapes.items()
    }
    ctx = StepContext(
        step=0,
        num_steps=1,
        timestep=torch.zeros(len(x_t), device=device),
        frames=frames,
        groups=Rows.of((COND,), len(x_t)),
        training=True,
        condition=Condition(**text).per_frame(frames),  # type: ignore[arg-type]
    )
    return ctx, x_t


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()
