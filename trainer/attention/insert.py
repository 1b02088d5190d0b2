"""Blocks inserted into a denoiser after modules of its own, as AnimateDiff inserts its motion
modules.

A block is a real module under the denoiser, so that optimiser, DDP, EMA and adapters see its
parameters by name. A forward hook of the module it stands after hands it that module's output:

    y = block(x, before, ctx)      x, y: what the module puts out; before: its first argument

Rows are clips times frames, the frames of a clip adjacent: (b f) c h w in a U-Net, (b f) n c in a
transformer, and ctx.frames says f. A block meets no clip of one frame, an image, unless it asks for
`stills`: the image model is then itself, whatever the block has learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer import pickles
from trainer.attention.context import ContextHolder
from trainer.attention.model import TakenError
from trainer.resources import shipped

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel

ASPECT = "what is inserted after"
# the files of a folder of weights: a run of ours, diffusers' MotionAdapter
FILES = ("adapter.safetensors", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class Item:
    """A block to insert: `after` and `path` are names in the denoiser, of the module it stands
    after and of itself.

    checkpoint: whether gradient checkpointing must run it again by itself, since no block of the
    model that is run again contains it.
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
        """Puts the block after another module, which has taken the place of the one before."""
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
                "rows is no whole number of them; give every frame of a clip a row"
            )
        if torch.is_grad_enabled() and getattr(block, "gradient_checkpointing", False):
            again: Any = block._gradient_checkpointing_func
            return cast(Tensor, again(block, x, before, ctx))
        return cast(Tensor, block(x, before, ctx))


def untouched(x: Tensor, block: nn.Module) -> Tensor:
    """x, and a gradient of zero for every parameter of a block that is passed by: DDP waits for
    one of each, and a batch of stills may train nothing else."""
    if not torch.is_grad_enabled():
        return x
    ones = [p.flatten()[0] for p in block.parameters() if p.requires_grad]
    return x + (torch.stack(ones).sum() * 0).to(x.dtype) if ones else x


def insert(model: AttentionModel, items: Sequence[Item], owner: str, trains: bool) -> list[str]:
    """Inserts the blocks and returns the names of the attention sites inside them.

    Raises:
        TakenError: another method has inserted something after one of these modules.
        ValueError: the denoiser has a module of that name already.
    """
    from trainer.attention.processor import Host  # which sets the holders

    denoiser = model.denoiser
    modules = dict(denoiser.named_modules())
    for item in items:
        for other in inserted_after(modules[item.after]):
            raise TakenError(f"{model.denoiser_name}.{item.after}", ASPECT, other.owner)
        if item.path in modules:
            raise ValueError(
                f"the denoiser has {item.path} already, so it is a model of clips; choose a "
                "backbone of images"
            )
    example = next(denoiser.parameters())
    for item in items:
        item.block.to(example).train(denoiser.training)
        if item.checkpoint:
            item.block.gradient_checkpointing = False  # type: ignore[assignment]  # diffusers' switch
        _register(denoiser, item.path, item.block)
        Insertion(modules[item.after], item, owner, trains)
    inside = tuple(f"{item.path}." for item in items)
    return [site.name for site in Host.attach(denoiser).sites if site.name.startswith(inside)]


def inserted_after(module: nn.Module) -> list[Insertion]:
    return [hook for hook in module._forward_hooks.values() if isinstance(hook, Insertion)]


def insertions(denoiser: nn.Module) -> list[Insertion]:
    """All of them; a copy of a denoiser has its own."""
    return [found for module in denoiser.modules() for found in inserted_after(module)]


def trained_inside(denoiser: nn.Module) -> set[int]:
    """Ids of the modules inside inserted blocks that train by the method which inserted them."""
    blocks = [found.block for found in insertions(denoiser) if found.trains]
    return {id(module) for block in blocks for module in block.modules()}


def hand_over(old: nn.Module, new: nn.Module) -> None:
    """What is inserted after `old` now stands after `new`: an adapter's wrapper, or what it
    wrapped."""
    for found in inserted_after(old):
        found.move(new)


def _register(denoiser: nn.Module, path: str, block: nn.Module) -> None:
    """As `path`; the list that a path ending in a number lies in is made at the first."""
    parent, _, leaf = path.rpartition(".")
    if leaf.isdecimal():
        owner, _, name = parent.rpartition(".")
        if leaf == "0":
            denoiser.get_submodule(owner).add_module(name, nn.ModuleList())
        blocks = cast(nn.ModuleList, denoiser.get_submodule(parent))
        assert len(blocks) == int(leaf)
        blocks.append(block)
    else:
        denoiser.get_submodule(parent).add_module(leaf, block)


@torch.no_grad()
def read_weights(
    model: AttentionModel,
    paths: Sequence[str],
    where: str,
    spelling: Callable[[str], str] | None = None,
) -> None:
    """Copies trained blocks into those at `paths` from an adapter of ours or the folder of a
    MotionAdapter; what else an adapter of ours holds stays behind.

    spelling: from what another writer calls a tensor to our name of it.

    Raises:
        ValueError: there is no such file, or it holds other blocks than these.
    """
    file = weights_file(where)
    if file.suffix in pickles.SUFFIXES:
        raise ValueError(f"weights={where}: {pickles.refusal(file)}")
    try:
        stored = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"weights={where}: not a safetensors file ({error}); pickles are never loaded"
        ) from None
    stored = {key.removeprefix(f"{model.denoiser_name}."): value for key, value in stored.items()}
    if spelling is not None:
        stored = {spelling(key): value for key, value in stored.items()}
    inside = tuple(f"{path}." for path in paths)
    wanted = {n: p for n, p in model.denoiser.named_parameters() if n.startswith(inside)}
    buffers = {name for name, _ in model.denoiser.named_buffers()}
    # what blocks of this kind are called, as in `motion_modules`
    marks = {path.rstrip(".0123456789").rpartition(".")[2] for path in paths}
    extra = [
        name
        for name in stored
        if name not in wanted and name not in buffers and marks & set(name.split("."))
    ]
    if missing := [name for name in wanted if name not in stored]:
        raise ValueError(f"weights={where}: it lacks {missing[0]}, {len(missing)} tensors in all")
    if extra:
        raise ValueError(
            f"weights={where}: it holds {extra[0]}, {len(extra)} tensors in all, for which these "
            "options make no place; give the options it was trained with"
        )
    for name, parameter in wanted.items():
        if stored[name].shape != parameter.shape:
            raise ValueError(
                f"weights={where}: {name} is {tuple(stored[name].shape)} there and "
                f"{tuple(parameter.shape)} here; it was trained for another backbone"
            )
        parameter.copy_(stored[name])


def weights_file(where: str) -> Path:
    """The file itself, or the one in a folder, which may be one that ships."""
    path = shipped(where)
    tried = [path / name for name in FILES] if path.is_dir() else [path]
    found = [file for file in tried if file.is_file()]
    if not found:
        raise ValueError(f"weights={where}: no such file, nor a folder with {' or '.join(FILES)}")
    return found[0]
