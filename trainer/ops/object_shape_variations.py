"""Object-level shape variations: one object of a picture changes its shape, by words that stand for
it in some steps, while other objects and the background stay.

    K = W_k c_source,  V = W_v c_proxy in a window of steps, W_v c_source outside it
    A[i, :] = A_source[i, :],  A[:, j] = A_source[:, j]    i, j: tokens of kept objects
    x <- x_source in the background                        once, late

Patashnik et al., ICCV 2023, arXiv 2303.11306, sections 4.1 (mix-and-match), 4.2 (attention-based
shape localization) and 4.3 (controllable background): the first at cross-attention, the second at
self-attention of small grids, both of conditional rows. Segments of the background are clusters of
self-attention maps that no word has a share in (k-means, 5 clusters, 0.3). Replaced rows and
columns are not scaled to sum to 1, as in the released code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.attention.op import Op, Traits
from trainer.attention.sites import require
from trainer.ops.editing.installed import edited_sites
from trainer.ops.editing.map_clusters import clusters, segments_of_words
from trainer.ops.editing.step_window import Window, is_inside, refuse_empty
from trainer.ops.editing.word_reader import SOURCE, TARGET, WordReader, columns_of

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.context import StepContext
    from trainer.attention.hooks import Prediction, Sampler
    from trainer.attention.sites import Site


@dataclass(frozen=True)
class Variation:
    """mix_steps, keep_steps: of the first two equations, None for no step; tokens: the largest grid
    of the second; keep_words: the objects that stay, None for all but the one that changes;
    keep_threshold: of their maps as probabilities; background_at: the share of the steps after
    which the source's background is put in, None for never; segments, segment_threshold: of it."""

    owner: str
    mix_steps: Window | None = (0.14, 0.34)
    keep_steps: Window | None = (0.0, 0.8)
    tokens: int = 32 * 32
    keep_words: Sequence[str] | None = None
    keep_threshold: float = 0.05
    background_at: float | None = 0.7
    segments: int = 5
    segment_threshold: float = 0.3


class PromptMixing:
    """The first equation: an op of cross-attention."""

    def __init__(self, told: Variation) -> None:
        self.steps = told.mix_steps
        self.name = f"{told.owner}_mixing"
        self.traits = Traits(owner=told.owner)

    @torch.compiler.disable  # it reads the step: compiled, every step would recompile
    def context(self, k_ctx: Tensor, v_ctx: Tensor, call: SiteCall) -> tuple[Tensor, Tensor]:
        ctx = call.ctx
        if not {SOURCE, TARGET} <= ctx.groups.slices.keys():
            return k_ctx, v_ctx
        source, own = ctx.rows(SOURCE), ctx.rows(TARGET)
        keys, values = k_ctx.clone(), v_ctx.clone()
        keys[own] = k_ctx[source]
        if not is_inside(self.steps, ctx):
            values[own] = v_ctx[source]
        return keys, values


class ShapeVariation:
    """The second and third equations: an op of self-attention that also reads its maps."""

    def __init__(self, told: Variation) -> None:
        self.told = told
        self.name = f"{told.owner}_kept"
        self.traits = Traits(owner=told.owner, scores=True)
        self.changed: WordReader | None = None
        self.kept: WordReader | None = None
        self.sums: dict[int, Tensor] = {}  # of the source's maps, by their tokens
        self.used: dict[str, Tensor] = {}

    def begin(self, sampler: Sampler) -> Mapping[Op, Sequence[Site]]:
        told = self.told
        refuse_empty({"mix_steps": told.mix_steps, "keep_steps": told.keep_steps}, sampler.steps)
        cross = require(sampler.sites, "cross", "sites")
        own = edited_sites(sampler, "self", kinds=("self",), op=self)
        found: dict[Op, Sequence[Site]] = {}
        self.used = {}
        self.changed = WordReader(told.owner, columns_of(sampler, None), told.tokens)
        if not any(bool(columns.any()) for columns in self.changed.columns.values()):
            return {PromptMixing(told): cross, self: own}
        found[self.changed] = cross
        if told.keep_words is not None:
            words = columns_of(sampler, told.keep_words)
            self.kept = WordReader(f"{told.owner}_objects", words, told.tokens)
            self.kept.traits = Traits(owner=told.owner, scores=True)
            found[self.kept] = cross
        return found | {PromptMixing(told): cross, self: own}

    def end(self) -> None:
        self.changed = self.kept = None
        self.sums = {}

    def shown(self) -> dict[str, Tensor]:
        return self.used

    def gate(self, q: Tensor, call: SiteCall) -> bool:
        known = {SOURCE, TARGET} <= call.ctx.groups.slices.keys()
        return known and q.shape[2] <= self.told.tokens

    @torch.compiler.disable
    def probs(self, probs: Tensor, call: SiteCall) -> Tensor:
        ctx = call.ctx
        source, own = probs[ctx.rows(SOURCE)], probs[ctx.rows(TARGET)]
        tokens = probs.shape[2]
        if self.told.background_at is not None and probs.shape[-1] == tokens:
            mean = source.mean(1).float()
            self.sums[tokens] = self.sums[tokens] + mean if tokens in self.sums else mean
        grid = call.grid(tokens, f"methods.{self.told.owner}")
        keep = self._keeps(grid, ctx) if is_inside(self.told.keep_steps, ctx) else None
        if keep is None or probs.shape[-1] != tokens:
            return probs
        kept = keep.to(probs.device)[:, None]
        found = probs.clone()
        found[ctx.rows(TARGET)] = torch.where(kept[..., None] | kept[..., None, :], source, own)
        return found

    def _keeps(self, grid: tuple[int, int], ctx: StepContext) -> Tensor | None:
        """The tokens (rows, h w) of objects that stay; None before there are maps."""
        changed = _maps(self.changed, SOURCE, grid, ctx=ctx)
        if changed is None:
            return None
        threshold = self.told.keep_threshold
        if self.told.keep_words is None:
            return changed <= threshold
        kept = _maps(self.kept, SOURCE, grid, ctx=ctx)
        return None if kept is None else (kept > threshold) & (changed <= threshold)

    def after_step(self, x_t: Tensor, prediction: Prediction, ctx: StepContext) -> Tensor:
        """A hook of the sampler: x_t (b f, c, h, w) with the source's background."""
        at, x_s = self.told.background_at, prediction.source
        if at is None or x_s is None or ctx.step != int(at * ctx.num_steps) or not self.sums:
            return x_t
        if self.changed is None or not self.changed.maps[SOURCE].sums:
            return x_t
        foreground = self._foreground((x_t.shape[-2], x_t.shape[-1]), ctx)
        self.used = {"background": (~foreground)[:, 0].float()}
        return torch.where(foreground.to(x_t.device), x_t, x_s)

    def _foreground(self, size: tuple[int, int], ctx: StepContext) -> Tensor:
        """True (rows, 1, *size) in segments that a word has a share in, of the source or edit."""
        tokens = max(self.sums)
        rows, found = self.sums[tokens], []
        side = _grid_of(tokens, size)
        for row, maps in enumerate(rows):
            labels = clusters(maps.cpu(), min(self.told.segments, tokens))
            inside = torch.zeros(tokens, dtype=torch.bool)
            for reader in (self.changed, self.kept):
                for group in (SOURCE, TARGET) if reader is not None else ():
                    words = _maps(reader, group, side, ctx=ctx)
                    if words is not None and bool(words[row].any()):
                        threshold = self.told.segment_threshold
                        inside |= segments_of_words(labels, words[row].cpu(), threshold)
            found.append(inside.view(1, *side))
        return F.interpolate(torch.stack(found).float(), size=size) > 0


def _grid_of(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """The grid of so many tokens over latents of a size."""
    factor = (size[0] * size[1] / tokens) ** 0.5
    return round(size[0] / factor), round(size[1] / factor)


def _maps(
    reader: WordReader | None, group: str, grid: tuple[int, int], *, ctx: StepContext
) -> Tensor | None:
    """The maps of a reader (rows, h w), a mean of the steps so far; None before there are some."""
    if reader is None or not reader.maps[group].sums:
        return None
    maps = reader.maps[group].average() / (ctx.step + 1)
    return F.interpolate(maps[:, None], size=grid, mode="bilinear").flatten(1)
