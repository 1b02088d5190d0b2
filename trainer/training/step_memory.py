"""What one training step takes beside weights, gradients and optimiser, counted with fake tensors:
no value is calculated, so that a step of a large model takes seconds and no memory."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.attention.condition import INTEGERS, Condition
from trainer.backbones.backbone import Backbone
from trainer.backbones.four_bits import scales
from trainer.backbones.held_layers import is_one_number
from trainer.config.schema import Recipe

# oneDNN copies what goes in and what comes out into a layout of its own, and back: 320 to 320
# channels on 128 x 128 take 23 MB for an output of 10 MB, 640 to 640 take 70 MB for 21 MB
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


def step_bytes(recipe: Recipe, backbone: Backbone, rows: int) -> int:
    """Bytes that a step of the denoiser with `rows` samples takes at its peak, beside its weights
    and the gradients of what trains.

    Without gradient checkpointing the peak is at the end of the forward, when all that the backward
    needs is there. With it a block calculates its own again in the backward, so that is run too.
    """
    side = (recipe.run.resolution or backbone.resolution) // backbone.divisor
    step = _Step(backbone.denoiser, backward=recipe.run.gradient_checkpointing)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = _fakes(mode, step)
    with mode:
        inputs = _empty_inputs(backbone, rows, side)
        known = [value.untyped_storage() for value in fakes.values()]
        with _Living(known) as living, backbone.computing():
            functional_call(step, fakes, args=(), kwargs=inputs)
            gradients = [value.grad for value in fakes.values() if value.grad is not None]
            return living.peak - sum(map(_bytes, gradients))


class _Step(nn.Module):
    """A forward of the denoiser, and its backward; while that runs, the denoiser has the parameters
    that the forward had."""

    def __init__(self, denoiser: nn.Module, *, backward: bool) -> None:
        super().__init__()
        self.denoiser, self.backward = denoiser, backward

    def forward(self, **inputs: Any) -> None:
        output = self.denoiser(**inputs)
        if self.backward:
            given = [each for each in tree_leaves(output.sample) if each.requires_grad]
            torch.autograd.backward([each.float().sum() for each in given])


class _Living(TorchDispatchMode):
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
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
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


def _empty_inputs(backbone: Backbone, rows: int, side: int) -> Any:
    """What the denoiser is called with, for `rows` latents of `side`; the values are arbitrary."""
    device = backbone.device
    x_t = torch.empty((rows, backbone.latent_channels, side, side), device=device)
    t = torch.zeros(rows, device=device)
    text = {
        name: torch.zeros(
            (rows, *shape), device=device, dtype=torch.long if name in INTEGERS else None
        )
        for name, shape in backbone.text_shapes.items()
    }
    return backbone.inputs(x_t, t, Condition(**text))


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()
