"""InFusion, on pictures: an edit takes its features from the source and from the difference that
the prompts make, and the edited concept alone is put into the source.

    f <- f_source + strength (f - f_source)       residual blocks of the decoder
    K, V <- K_source, V_source                    self-attention of the decoder
    x <- x_source outside the mask of the words   after each step

arXiv 2308.00135, sections 3.2 (injection) and 3.3 (attention fusion). The paper's coefficients are
not public; those here are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.attention.op import Op
from trainer.ops.editing.installed import hooked_features
from trainer.ops.editing.source_rows import halves
from trainer.ops.editing.step_window import Window, is_inside, refuse_empty
from trainer.ops.editing.word_maps import word_mask
from trainer.ops.editing.word_reader import WordReader, columns_of
from trainer.ops.masactrl import MutualSelfAttention, Sharing

if TYPE_CHECKING:
    from trainer.attention.context import StepContext
    from trainer.attention.hooks import Prediction, Sampler
    from trainer.attention.residual_blocks import ResidualBlock
    from trainer.attention.sites import Site


@dataclass(frozen=True)
class Fusion:
    """features, feature_steps, strength: of the first equation; sites, steps: of the second; words,
    threshold, fuse_from, mask_tokens: of the third, words None for those that differ, False for no
    mask; None for no step."""

    owner: str
    sites: str
    steps: Window | None = (0.0, 0.5)
    features: str = "up"
    feature_steps: Window | None = (0.0, 0.8)
    strength: float = 0.8
    words: Sequence[str] | bool | None = None
    threshold: float = 0.3
    fuse_from: float = 0.2
    mask_tokens: int = 16 * 16


class InFusionEditor:
    """Changes residual blocks, and fuses after each step; self-attention is shared by an op of
    its own."""

    def __init__(self, told: Fusion) -> None:
        self.told = told
        self.handles: list[Any] = []
        self.reader: WordReader | None = None
        self.used: dict[str, Tensor] = {}

    def begin(self, sampler: Sampler) -> Mapping[Op, Sequence[Site]]:
        told = self.told
        found: dict[Op, Sequence[Site]] = {}
        refuse_empty({"steps": told.steps, "feature_steps": told.feature_steps}, sampler.steps)
        self.used = {}
        if told.steps is not None:
            shared = MutualSelfAttention(Sharing(told.owner, told.sites, steps=told.steps))
            found |= shared.begin(sampler)
        if told.words is not False:
            words = None if told.words is None or told.words is True else told.words
            self.reader = WordReader(told.owner, columns_of(sampler, words), told.mask_tokens)
            found[self.reader] = [site for site in sampler.sites if site.kind == "cross"]
        if told.feature_steps is not None:
            self.handles = hooked_features(sampler, told.features, self.injected)
        return found

    def end(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.reader = [], None

    def shown(self) -> dict[str, Tensor]:
        return self.used

    @torch.compiler.disable  # it reads the step: compiled, every step would recompile
    def injected(self, made: Tensor, block: ResidualBlock, ctx: StepContext) -> Tensor:
        """What a residual block makes (b, c, h, w), the edit's drawn to the source's."""
        if not is_inside(self.told.feature_steps, ctx):
            return made
        found = made.clone()
        for source, own in halves(ctx):
            found[own] = made[source] + self.told.strength * (made[own] - made[source])
        return found

    def after_step(self, x_t: Tensor, prediction: Prediction, ctx: StepContext) -> Tensor:
        """A hook of the sampler: x_t (b f, c, h, w), the source outside the mask."""
        x_s = prediction.source
        if self.reader is None or x_s is None:
            return x_t
        if ctx.step < int(self.told.fuse_from * ctx.num_steps):
            return x_t
        size = (x_t.shape[-2], x_t.shape[-1])
        masks = [
            word_mask(maps.average(), size, self.told.threshold)
            for maps in self.reader.maps.values()
        ]
        inside = masks[0] | masks[1]
        self.used = {"fused": inside[:, 0].float()}
        return torch.where(inside, x_t, x_s)
