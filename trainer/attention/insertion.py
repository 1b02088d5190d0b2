"""Blocks that are inserted into a denoiser: what one holds, how it runs, and how to find it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.attention.context import ContextHolder


@dataclass(frozen=True)
class Item:
    """A block to insert.

    after: the name in the denoiser of the module whose output it takes; path: its own name there.
    stills: whether it also runs on clips of one frame, which are images. checkpoint: whether
    gradient checkpointing must run it again separately, because no block of the model that is run
    again contains it.
    """

    after: str
    path: str
    block: nn.Module
    stills: bool = False
    checkpoint: bool = False


class Insertion:
    """The hook of one block. It refers to the block and the context holder only, so that copying
    part of a denoiser does not copy the rest; the denoiser's host sets the holder."""

    def __init__(self, after: nn.Module, item: Item, owner: str, trains: bool) -> None:
        self.block, self.stills, self.owner, self.trains = item.block, item.stills, owner, trains
        self.holder = ContextHolder()
        self.handle = after.register_forward_hook(self, with_kwargs=True)

    def move(self, module: nn.Module) -> None:
        """Puts the block after another module, which has replaced the one before."""
        self.handle.remove()
        self.handle = module.register_forward_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before = args[0] if args else next(iter(kwargs.values()))
        if isinstance(output, tuple):
            return (self.run(output[0], before), *output[1:])
        return self.run(output, before)

    def run(self, x: Tensor, before: Tensor) -> Tensor:
        ctx, block = self.holder.ctx, self.block
        if ctx.frames == 1 and not self.stills:
            return untouched(x, block)
        if len(x) % ctx.frames:
            raise ValueError(
                f"methods.{self.owner} sees clips of {ctx.frames} frames, and a batch of {len(x)} "
                "rows does not divide into them; give every frame of a clip a row"
            )
        if torch.is_grad_enabled() and getattr(block, "gradient_checkpointing", False):
            again: Any = block._gradient_checkpointing_func
            return cast(Tensor, again(partial(block, ctx=ctx), x, before))
        return cast(Tensor, block(x, before, ctx))


def untouched(x: Tensor, block: nn.Module) -> Tensor:
    """x, with a gradient of zero for every parameter of a block that does not run: DDP waits for a
    gradient of each parameter, and a batch of images may train nothing else."""
    if not torch.is_grad_enabled():
        return x
    ones = [p.flatten()[0] for p in block.parameters() if p.requires_grad]
    return x + (torch.stack(ones).sum() * 0).to(x.dtype) if ones else x


def inserted_after(module: nn.Module) -> list[Insertion]:
    return [hook for hook in module._forward_hooks.values() if isinstance(hook, Insertion)]


def insertions(denoiser: nn.Module) -> list[Insertion]:
    """All insertions in a denoiser; a copy of a denoiser has its own."""
    return [found for module in denoiser.modules() for found in inserted_after(module)]


def trained_inside(denoiser: nn.Module) -> set[int]:
    """Ids of the modules inside inserted blocks that train by the method which inserted them."""
    blocks = [found.block for found in insertions(denoiser) if found.trains]
    return {id(module) for block in blocks for module in block.modules()}


def move_insertions(old: nn.Module, new: nn.Module) -> None:
    """Moves what is inserted after `old` to `new`: an adapter's wrapper, or the layer it
    wrapped."""
    for found in inserted_after(old):
        found.move(new)
