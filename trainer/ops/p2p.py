"""Prompt-to-Prompt: the attention maps of an edit are those of its source, by words.

    A <- g (w (alpha A_source R + (1 - alpha) A)) + (1 - g) A      cross-attention
    A <- A_source                                                  self-attention, small grids
    x <- x_source outside the mask of the words                    after each step

Hertz et al., arXiv 2208.01626, algorithm 1 and section 3.2: R and alpha align the words
(`editing/word_tools.py`), w weighs them, g is 1 in the window of steps of each. Rows are those of
`target/cond` and `source/cond`, frames of a clip as rows of their own; all others stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.attention.op import Traits
from trainer.attention.sites import require
from trainer.ops.editing.step_window import Window, is_inside, refuse_empty
from trainer.ops.editing.word_maps import WordMaps, word_mask
from trainer.ops.editing.word_tools import (
    factors,
    places_of_word,
    refinement,
    replacement,
    word_columns,
)

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.context import StepContext
    from trainer.attention.hooks import Prediction, Sampler
    from trainer.attention.read_prompt import ReadPrompt
    from trainer.attention.sites import Site

SOURCE, TARGET = "source/cond", "target/cond"
NEVER: Window = (0.0, 0.0)


@dataclass(frozen=True)
class MapEdits:
    """What is edited. replace: maps go to the words in their place, else to equal words; cross: the
    steps in which they do, None for none; words: the steps of single words; own: those in which
    self-attention has the source's maps, at sites of at most `tokens` tokens; weights: factors on
    the maps of words; blend: the words outside whose masks the source stays, True for those that
    differ, False for no mask; threshold, blend_from, blend_tokens: of these masks, see `word_mask`,
    the share of the steps before the first blending, and the largest grid."""

    owner: str
    sites: str = "self | cross"
    replace: bool = True
    cross: Window | None = (0.0, 0.8)
    words: Mapping[str, Window] = field(default_factory=dict)
    own: Window | None = (0.0, 0.4)
    tokens: int = 16 * 16
    weights: Mapping[str, float] = field(default_factory=dict)
    blend: bool | Sequence[str] = False
    threshold: float = 0.3
    blend_from: float = 0.2
    blend_tokens: int = 16 * 16


@dataclass(frozen=True, eq=False)
class Told:
    """What one sampling of b pictures or clips is told; m tokens of text. mapping (b, m, m), alpha
    (b, m), weight (b, m) as at the top of this file; first, last (b, m): the steps in which each
    token has its source's maps; columns: by group (b, m), 1 for the tokens whose maps make the
    mask."""

    mapping: Tensor
    alpha: Tensor
    weight: Tensor
    first: Tensor
    last: Tensor
    columns: Mapping[str, Tensor]


class PromptToPrompt:
    """An op of cross- and self-attention, and the hooks that put it there while an edit is sampled:
    `open`, `after_step`, `close`."""

    def __init__(self, edits: MapEdits) -> None:
        self.edits = edits
        self.name = f"{edits.owner}_maps"
        self.traits = Traits(owner=edits.owner, scores=True)
        self.told: Told | None = None
        self.maps = {group: WordMaps(edits.blend_tokens) for group in (SOURCE, TARGET)}

    def open(self, sampler: Sampler) -> None:
        """A hook of the sampler. Raises ValueError for words, windows and sites that do not fit."""
        if sampler.source_prompt is None:
            return
        edits = self.edits
        try:
            check_windows(edits, sampler.steps)
            chosen = mapped_sites(sampler.sites, edits.sites)
            source = sampler.read(sampler.source_prompt)
            self.told = told_of(edits, source, [sampler.read(prompt) for prompt in sampler.prompts])
            sampler.host.install(self, chosen)
        except ValueError as error:
            self.told = None
            raise ValueError(f"methods.{edits.owner}: {error}") from error

    def close(self, sampler: Sampler) -> None:
        """A hook of the sampler."""
        if self.told is None:
            return
        self.told = None
        self.maps = {group: WordMaps(self.edits.blend_tokens) for group in (SOURCE, TARGET)}
        sampler.host.remove(self)

    def gate(self, q: Tensor, call: SiteCall) -> bool:
        ctx, tokens = call.ctx, q.shape[2]
        if self.told is None or not {SOURCE, TARGET} <= ctx.groups.slices.keys():
            return False
        if call.site.kind == "cross":
            return self._mapped(ctx) or self._blends(tokens)
        return tokens <= self.edits.tokens and is_inside(self.edits.own, ctx)

    @torch.compiler.disable  # it reads the step: compiled, every step would recompile
    def probs(self, probs: Tensor, call: SiteCall) -> Tensor:
        ctx = call.ctx
        source, target = (ctx.rows(group) for group in (SOURCE, TARGET))
        if call.site.kind == "cross":
            self._check_keys(probs, call)
            if self._blends(probs.shape[2]):
                self._keep(probs, call)
            if not self._mapped(ctx):
                return probs
            own = self._words_of(probs[source], probs[target], ctx.step / ctx.num_steps)
        else:
            own = probs[source]
        edited = probs.clone()
        edited[target] = own
        return edited

    def after_step(self, x_t: Tensor, prediction: Prediction, ctx: StepContext) -> Tensor:
        """A hook of the sampler: x_t (b f, c, h, w) with the source outside the mask."""
        edits, x_s = self.edits, prediction.source
        if self.told is None or x_s is None or edits.blend is False:
            return x_t
        if ctx.step < int(edits.blend_from * ctx.num_steps):
            return x_t
        size = (x_t.shape[-2], x_t.shape[-1])
        masks = [word_mask(maps.average(), size, edits.threshold) for maps in self.maps.values()]
        return torch.where(masks[0] | masks[1], x_t, x_s)

    def _mapped(self, ctx: StepContext) -> bool:
        """Whether a word has its source's maps at this step."""
        edits = self.edits
        return any(is_inside(window, ctx) for window in (edits.cross, *edits.words.values()))

    def _blends(self, tokens: int) -> bool:
        return self.edits.blend is not False and self.maps[SOURCE].takes(tokens)

    def _words_of(self, source: Tensor, target: Tensor, share: float) -> Tensor:
        """The edit's maps (r, h, n, m) of those of both rows, at a share of the steps."""
        assert self.told is not None
        told, each = self.told, len(target) // len(self.told.alpha)  # rows of a clip

        def per_row(values: Tensor) -> Tensor:  # (b, m) to (r, 1, 1, m)
            return values.repeat_interleave(each, 0).to(target)[:, None, None]

        mapping = told.mapping.repeat_interleave(each, 0).to(target)[:, None]
        alpha = per_row(told.alpha)
        found = (alpha * (source @ mapping) + (1 - alpha) * target) * per_row(told.weight)
        now = (told.first <= share) & (share < told.last)
        return torch.where(per_row(now) > 0, found, target)

    def _keep(self, probs: Tensor, call: SiteCall) -> None:
        """Adds the maps of the words, before they are changed, to those of earlier steps."""
        assert self.told is not None
        for group, columns in self.told.columns.items():
            own = probs[call.ctx.rows(group)]
            self.maps[group].add_words(own, columns, call=call, who=f"methods.{self.edits.owner}")

    def _check_keys(self, probs: Tensor, call: SiteCall) -> None:
        assert self.told is not None
        call.spans(probs.shape[-1], keys=True)  # refuses keys of which it is not known
        if probs.shape[-1] != self.told.alpha.shape[-1]:
            raise ValueError(
                f"methods.{self.edits.owner} edits the maps of {self.told.alpha.shape[-1]} text "
                f"tokens, and {call.site.name!r} has {probs.shape[-1]} keys: another method adds "
                "some; leave one of them out"
            )


def mapped_sites(every: Sequence[Site], selector: str) -> list[Site]:
    """The sites whose maps are edited; ValueError where there are none, or of another kind."""
    sites = require(every, selector, "sites")
    for site in sites:
        if site.kind not in ("self", "cross"):
            raise ValueError(
                f"{site.name} is {site.kind} attention, whose maps are not those of a picture to "
                "itself or to its text; choose among self and cross, as in sites=cross"
            )
    return sites


def check_windows(edits: MapEdits, steps: int) -> None:
    """Raises ValueError for a window in which there is no step."""
    named = {"cross_steps": edits.cross, "self_steps": edits.own}
    refuse_empty(named | {f"word_steps.{word}": own for word, own in edits.words.items()}, steps)


def told_of(edits: MapEdits, source: ReadPrompt, targets: Sequence[ReadPrompt]) -> Told:
    """What is edited of a source's prompt to each of some prompts.

    Raises:
        ValueError: a word is in neither prompt, or the prompts have different numbers of words
        where they need one.
    """
    mappings, alphas = [], []
    for target in targets:
        if edits.replace:
            mapping = replacement(source, target)
            alpha = torch.ones(target.length)
        else:
            mapping, alpha = refinement(source, target)
        mappings.append(mapping)
        alphas.append(alpha)
    windows = torch.stack([_windows(edits, target) for target in targets])
    masked = [_columns(edits, source, target) for target in targets]
    return Told(
        torch.stack(mappings),
        torch.stack(alphas),
        weight=torch.stack([factors(target, edits.weights) for target in targets]),
        first=windows[..., 0],
        last=windows[..., 1],
        columns={
            SOURCE: torch.stack([own for own, _ in masked]),
            TARGET: torch.stack([other for _, other in masked]),
        },
    )


def _windows(edits: MapEdits, target: ReadPrompt) -> Tensor:
    """(m, 2), as shares of the steps."""
    found = torch.tensor(edits.cross or NEVER, dtype=torch.float64).repeat(target.length, 1)
    for word, window in edits.words.items():
        found[places_of_word(target, word)] = torch.tensor(window, dtype=torch.float64)
    return found


def _columns(edits: MapEdits, source: ReadPrompt, target: ReadPrompt) -> tuple[Tensor, Tensor]:
    """(m,) of the source and of the prompt, 1 for the tokens whose maps make the mask."""
    if edits.blend is False:
        return torch.zeros(source.length), torch.zeros(target.length)
    return word_columns(source, target, None if edits.blend is True else edits.blend)
