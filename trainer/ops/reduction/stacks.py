"""Transformer blocks that follow each other, in which tokens can be left out: what a method keeps
of one call of the denoiser from one block to a later one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar
from weakref import WeakKeyDictionary

from trainer.attention.feed_forward import feed_forward_of
from trainer.attention.sites import Site, require

if TYPE_CHECKING:
    from trainer.attention.context import StepContext
    from trainer.attention.model import AttentionModel

Kept = TypeVar("Kept")


def stack_of(site: Site) -> str:
    """The name of the list of blocks that a site is in, as `mid_block.attentions.0.blocks`."""
    return site.name.rpartition(".")[0].rpartition(".")[0]


def stacks_of(model: AttentionModel, selector: str, who: str) -> dict[str, list[Site]]:
    """The self-attention of every stack of several blocks, in order, by the stack's name.

    Raises:
        ValueError: none has several, or its blocks need every token.
    """
    stacks: dict[str, list[Site]] = {}
    for site in require(model.sites, selector, "sites"):
        if site.kind == "self" and not site.text_alone:
            stacks.setdefault(stack_of(site), []).append(site)
    found = {name: own for name, own in stacks.items() if len(own) > 1}
    if not found:
        raise ValueError(
            f"{who} leaves tokens out of the blocks after one, and no self-attention that was "
            "chosen has another after it in its stack of blocks; choose other sites, or another "
            "backbone, as tiny_dit"
        )
    for sites in found.values():
        for site in sites:
            _refuse_whole(model, site, who)
    return found


def blocks_around(model: AttentionModel, stack: str) -> list[Site]:
    """All attention inside a stack."""
    return [site for site in model.sites if site.name.startswith(f"{stack}.")]


def _refuse_whole(model: AttentionModel, site: Site, who: str) -> None:
    if site.keeps_processor:
        raise ValueError(
            f"{who} leaves tokens out, and {site.name!r} gives each its position by its number; "
            "choose other sites, or another backbone"
        )
    block = model.denoiser.get_submodule(site.name.rpartition(".")[0])
    if feed_forward_of(block) is None:
        raise ValueError(
            f"{who} leaves tokens out, and the feed-forward layer after {site.name!r} reads the "
            "neighbours of each; choose other sites, or another backbone"
        )


class OfOneCall(Generic[Kept]):
    """What an op keeps for each stack during one call of the denoiser, and no longer."""

    def __init__(self) -> None:
        self.kept: WeakKeyDictionary[StepContext, dict[str, Kept]] = WeakKeyDictionary()

    def put(self, ctx: StepContext, stack: str, value: Kept) -> None:
        self.kept.setdefault(ctx, {})[stack] = value

    def get(self, ctx: StepContext, stack: str) -> Kept | None:
        return self.kept.get(ctx, {}).get(stack)

    def take(self, ctx: StepContext, stack: str) -> Kept | None:
        return self.kept.get(ctx, {}).pop(stack, None)
