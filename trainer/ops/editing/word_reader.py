"""Reads the cross-attention maps of words while an edit is sampled, and changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.attention.hooks import SamplingHook
from trainer.attention.op import Op, Traits, has_stage
from trainer.attention.rows import Rows
from trainer.ops.editing.installed import editing_hook
from trainer.ops.editing.word_maps import WordMaps, to_unit
from trainer.ops.editing.word_tools import word_columns

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.hooks import Sampler
    from trainer.attention.host import Host
    from trainer.attention.sites import Site

SOURCE, TARGET = "source/cond", "target/cond"
NAMES = {"source": "source", "target": "edit"}  # of what is shown, by branch
FINEST = 32 * 32  # tokens of a grid whose maps are shown


class WordReader:
    """An op of cross-attention. columns (b, m): by group of rows, 1 for the tokens of the words;
    most: tokens of a grid that is read; last: whether the maps are those of the last step alone.
    `maps` has those of each group."""

    def __init__(
        self, owner: str | None, columns: Mapping[str, Tensor], most: int, last: bool = False
    ) -> None:
        self.name = f"{owner or 'shown'}_words"
        self.traits = Traits(owner=owner, scores=True)
        self.columns, self.last = columns, last
        self.maps = {group: WordMaps(most, "mask_tokens") for group in columns}
        self.step = -1

    def gate(self, q: Tensor, call: SiteCall) -> bool:
        known = any(group in call.ctx.groups.slices for group in self.columns)
        return known and next(iter(self.maps.values())).takes(q.shape[2])

    @torch.compiler.disable  # it reads the step: compiled, every step would recompile
    def probs(self, probs: Tensor, call: SiteCall) -> Tensor:
        groups: Rows = call.ctx.groups
        call.spans(probs.shape[-1], keys=True)  # refuses keys of which it is not known
        if self.last and call.ctx.step != self.step:
            for group, before in self.maps.items():
                self.maps[group] = WordMaps(before.most, before.option)
            self.step = call.ctx.step
        for group, columns in self.columns.items():
            if group in groups.slices:
                _check_keys(probs, columns, call, owner=self.traits.owner)
                own = probs[groups.find(group)]
                self.maps[group].add_words(own, columns, call=call, who=self.name)
        return probs


def _check_keys(probs: Tensor, columns: Tensor, call: SiteCall, *, owner: str | None) -> None:
    if probs.shape[-1] != columns.shape[-1]:
        who = "the maps of words" if owner is None else f"methods.{owner}"
        raise ValueError(
            f"{who}: a prompt has {columns.shape[-1]} tokens, and {call.site.name!r} "
            f"{probs.shape[-1]} keys: another method adds some; leave one of them out"
        )


def columns_of(sampler: Sampler, words: Sequence[str] | None) -> dict[str, Tensor]:
    """The columns (b, m) of words in the source's prompt and in those of its edits, by group; None
    for the words that differ.

    Raises:
        ValueError: a word is in neither prompt.
    """
    source = sampler.read(sampler.source_prompt or "")
    each = [word_columns(source, sampler.read(prompt), words) for prompt in sampler.prompts]
    return {
        SOURCE: torch.stack([own for own, _ in each]),
        TARGET: torch.stack([other for _, other in each]),
    }


class ShownMaps:
    """Reads the maps of the words that differ between a source and its edits, to be shown."""

    def __init__(self) -> None:
        self.reader: WordReader | None = None
        self.found: dict[str, Tensor] = {}

    def begin(self, sampler: Sampler) -> dict[Op, list[Site]]:
        columns = columns_of(sampler, None) if sampler.source_prompt is not None else {}
        cross = [site for site in sampler.sites if site.kind == "cross"]
        sites = [site for site in cross if has_maps(sampler.host, site)]
        self.found = {}
        if not sites or not any(bool(own.any()) for own in columns.values()):
            return {}
        self.reader = WordReader(None, columns, FINEST)
        return {self.reader: sites}

    def end(self) -> None:
        if self.reader is not None and self.reader.maps[TARGET].sums:
            for group, maps in self.reader.maps.items():
                branch = group.partition("/")[0]
                self.found[f"{NAMES[branch]} words"] = to_unit(maps.average())
        self.reader = None

    def shown(self) -> dict[str, Tensor]:
        return self.found


def has_maps(host: Host, site: Site) -> bool:
    """Whether a site computes attention maps when it is asked to."""
    hosted = host.processors.get(site.name)
    kernels = [] if hosted is None else [op for op in hosted.ops if has_stage(op, "kernel")]
    return hosted is not None and not site.native.linear and not kernels


def reading_hook(owner: str) -> SamplingHook:
    """What reads the maps of the words that differ; nothing where no site computes any."""
    maps = ShownMaps()
    return editing_hook(owner, maps, None, shown=maps.shown)
