"""Gradient checkpointing: the backward pass calculates a layer's activations again, which takes
less memory and more time (arXiv 1604.06174). Of which layers, and where their inputs wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from inspect import unwrap
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

CACHES = ("past_key_values", "past_key_value")
# how blocks of the denoisers of diffusers call their feed-forward parts
FEED_FORWARD = ("ff", "ff_context", "ffn", "feed_forward", "mlp", "img_mlp", "txt_mlp")


@dataclass(frozen=True, eq=False)
class Recompute:
    """What is calculated again: of the blocks of each class the first, and every `every`-th after
    it, in the order in which a forward runs them; or, with feed_forward, the feed-forward part of
    every block, whose inner values are most of what a block keeps. offload: the inputs of what is
    calculated again wait in main memory."""

    every: int = 1
    feed_forward: bool = False
    offload: bool = False
    numbers: dict[Any, int] = field(default_factory=dict)  # of blocks that have run, in their class

    def takes(self, block: Any) -> bool:
        """Whether this block, or the function that runs it, is calculated again."""
        block = block_behind(block)
        if block not in self.numbers:
            self.numbers[block] = sum(type(other) is type(block) for other in self.numbers)
        return self.numbers[block] % self.every == 0

    def __call__(self, block: Any, *args: Any) -> Any:
        """As diffusers calls it in the place of the block."""
        if not self.takes(block):
            return block(*args)
        with self.waiting():
            return checkpoint(block, *args, use_reentrant=False)

    def waiting(self) -> AbstractContextManager[Any]:
        if not self.offload:
            return nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())


def block_behind(block: Any) -> Any:
    """The module that a function runs, if it is the function of a module."""
    block = unwrap(block)
    while isinstance(block, partial):
        block = unwrap(block.func)
    return getattr(block, "__self__", block)


def checkpoint_denoiser(denoiser: Any, how: Recompute) -> None:
    """Makes a denoiser of diffusers calculate again what `how` says.

    Raises:
        ValueError: it has no feed-forward part of a known name, and they are to be.
    """
    if not how.feed_forward:
        denoiser.enable_gradient_checkpointing(how)
        return
    parts = list(feed_forward_parts(denoiser))
    if not parts:
        raise ValueError(
            f"run.gradient_checkpointing=feed_forward: {type(denoiser).__name__} has no "
            f"feed-forward part called {', '.join(FEED_FORWARD)}; give "
            "run.gradient_checkpointing=true"
        )
    for part in parts:
        part.forward = partial(_again, how, part.forward)


def feed_forward_parts(denoiser: nn.Module) -> Iterator[Any]:
    """The feed-forward parts of its blocks."""
    for name, module in denoiser.named_modules():
        if name.rpartition(".")[2] in FEED_FORWARD and has_parameters(module):
            yield module


def has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def checkpoint_layers(encoder: nn.Module, how: Recompute) -> None:
    """Makes layers of a text encoder of transformers keep their inputs only, every `how.every`-th
    of them.

    transformers itself does so in train mode alone. A text encoder of which only a word or an
    adapter trains is in eval mode, so that its dropout is off.

    Raises:
        ValueError: the encoder has no layers that transformers can checkpoint.
    """
    layers = [each for each in encoder.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"run.gradient_checkpointing: {type(encoder).__name__} has no layers that can be "
            "calculated again; leave it out"
        )
    for layer in layers[:: how.every]:
        layer.forward = partial(_again, how, layer.forward)


def _again(how: Recompute, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # language models keep keys and values for the next token; the second time they would be added
    # to those of the first
    kwargs |= {name: None for name in CACHES if name in kwargs}
    with how.waiting():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
