"""Blocks inserted into a denoiser after modules of its own, as motion modules are.

A block is a real module under the denoiser, so that optimiser, DDP, EMA and adapters see its
parameters by name. A forward hook on the module before it passes it that module's output, and
replaces the output by what the block returns:

    y = block(x, before, ctx)      x: the module's output; before: the module's first argument

Rows are clips times frames, the frames of a clip adjacent: (b f) c h w in a U-Net, (b f) n c in a
transformer, where f is ctx.frames. A block does not run on clips of one frame, which are images,
unless it asks for `stills`: whatever the block has learned, images come out as without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from trainer.attention.anatomy import refuse_joint
from trainer.attention.errors import TakenError
from trainer.attention.host import Host
from trainer.attention.insertion import Insertion, Item, inserted_after

if TYPE_CHECKING:
    from trainer.attention.model import AttentionModel


ASPECT = "what is inserted after"


def insert(model: AttentionModel, items: Sequence[Item], owner: str, trains: bool) -> list[str]:
    """Inserts the blocks and returns the names of the attention sites inside them.

    Raises:
        TakenError: another method has inserted something after one of these modules.
        ValueError: the denoiser has a module of that name already, frames as tokens, or joint
        attention.
    """
    denoiser, host = model.denoiser, model.host
    host.require_rows("what is inserted")
    refuse_joint(denoiser, host.sites)
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
    exact = torch.promote_types(example.dtype, torch.float32)  # half precision would round it
    for item in items:
        item.block.to(example.device, exact).train(denoiser.training)
        if item.checkpoint:
            item.block.gradient_checkpointing = False  # type: ignore[assignment]  # diffusers' switch
        _register(denoiser, item.path, item.block)
        Insertion(modules[item.after], item, owner=owner, trains=trains)
    inside = tuple(f"{item.path}." for item in items)
    host = Host.attach(denoiser, host.traits)  # this also sets the context holders
    return [site.name for site in host.sites if site.name.startswith(inside)]


def _register(denoiser: nn.Module, path: str, block: nn.Module) -> None:
    """Registers the block as `path`. Where a path ends in a number, the block belongs to a list,
    which the first one creates."""
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
