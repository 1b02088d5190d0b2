"""Shape-Guided Diffusion: an object is replaced inside a given mask, since tokens inside it attend
to the words of the object and to each other, tokens outside to the others.

    A <- A m_j at words inside, A (1 - m_j) at words outside, 0 at padding    cross-attention
    A <- A ((io_ij - 1) s + 1),  io_ij = 1 iff i and j are on one side        self-attention
    x <- x_source outside the mask                                            after each step

Park et al., arXiv 2212.00210, section 3.2 (inside-outside attention), equations 2 to 4; maps are
multiplied after the softmax, and not scaled to sum to 1. s falls with the steps, as the released
code has it: exp .95 ** (50 t), linear, cosine or constant, t the share of the steps done. The token
before the first word keeps its share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.attention.op import Op, Traits
from trainer.ops.editing.grid_masks import on_grid
from trainer.ops.editing.installed import edited_sites
from trainer.ops.editing.source_rows import halves
from trainer.ops.editing.word_reader import TARGET, columns_of

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.context import StepContext
    from trainer.attention.hooks import Prediction, Sampler
    from trainer.attention.read_prompt import ReadPrompt
    from trainer.attention.sites import Site

STRENGTHS: dict[str, Callable[[float], float]] = {
    "exp": lambda t: 0.95 ** (50 * t),
    "linear": lambda t: 1 - t,
    "cosine": lambda t: cos(pi * t / 2),
    "constant": lambda t: 1.0,
}


@dataclass(frozen=True)
class InsideOutside:
    """schedule: of `STRENGTHS`; words: those of the object, None for those that differ;
    background: whether the source stays outside the mask."""

    owner: str
    sites: str
    schedule: str = "exp"
    words: Sequence[str] | None = None
    background: bool = True


class InsideOutsideAttention:
    """An op of cross- and self-attention, put there while an edit is sampled."""

    def __init__(self, told: InsideOutside) -> None:
        self.told = told
        self.name = f"{told.owner}_sides"
        self.traits = Traits(owner=told.owner, scores=True)
        self.mask: Tensor | None = None
        self.inside, self.outside = torch.zeros(0), torch.zeros(0)

    def begin(self, sampler: Sampler) -> Mapping[Op, Sequence[Site]]:
        told = self.told
        self.mask = sampler.mask("source")
        if self.mask is None:
            raise ValueError("it needs the mask of the object; give mask=<a picture>")
        self.inside = columns_of(sampler, told.words)[TARGET]
        for prompt, words in zip(sampler.prompts, self.inside, strict=True):
            if not words.any():
                raise ValueError(
                    f"the prompt {prompt!r} has no word that differs from the source's, to be put "
                    f"inside the mask; give methods.{told.owner}.inside"
                )
        read = [sampler.read(prompt) for prompt in sampler.prompts]
        whole = torch.stack([_words_of(prompt) for prompt in read])
        self.outside = whole * (1 - self.inside)
        return {self: edited_sites(sampler, told.sites, kinds=("self", "cross"), op=self)}

    def end(self) -> None:
        self.mask = None

    @torch.compiler.disable  # it reads the step: compiled, every step would recompile
    def probs(self, probs: Tensor, call: SiteCall) -> Tensor:
        ctx = call.ctx
        pairs = halves(ctx)
        if self.mask is None or not pairs:
            return probs
        inside = on_grid(self.mask, call.grid(probs.shape[2], f"methods.{self.told.owner}"), 1)[0]
        inside = inside.to(probs.device)
        found = probs.clone()
        if call.site.kind == "cross":
            call.spans(probs.shape[-1], keys=True)  # refuses keys of which it is not known
            own = ctx.rows(TARGET)
            found[own] = probs[own] * self._of_words(inside, len(probs[own]), probs)
            return found
        io = (inside[:, None] == inside[None]).to(probs)  # n n
        strength = STRENGTHS[self.told.schedule](ctx.step / ctx.num_steps)
        for _, own in pairs:
            found[own] = probs[own] * ((io - 1) * strength + 1)
        return found

    def _of_words(self, inside: Tensor, rows: int, like: Tensor) -> Tensor:
        """The factors (rows, 1, n, m) of cross-attention."""
        if like.shape[-1] != self.inside.shape[-1]:
            raise ValueError(
                f"methods.{self.told.owner} knows {self.inside.shape[-1]} text tokens, and there "
                f"are {like.shape[-1]} keys: another method adds some; leave one of them out"
            )
        each = rows // len(self.inside)  # rows of a clip
        within, beyond = (
            words.repeat_interleave(each, 0).to(like)[:, None, None]  # rows 1 1 m
            for words in (self.inside, self.outside)
        )
        m = inside.to(like)[:, None]  # n 1
        first = torch.zeros_like(within)
        first[..., 0] = 1 - within[..., 0] - beyond[..., 0]
        return within * m + beyond * (1 - m) + first

    def after_step(self, x_t: Tensor, prediction: Prediction, ctx: StepContext) -> Tensor:
        """A hook of the sampler: x_t (b f, c, h, w), the source outside the mask."""
        x_s = prediction.source
        if self.mask is None or x_s is None or not self.told.background:
            return x_t
        inside = F.interpolate(self.mask, size=x_t.shape[-2:], mode="area") > 0
        return torch.where(inside.to(x_t.device), x_t, x_s)


def _words_of(prompt: ReadPrompt) -> Tensor:
    """(m,) 1 for the tokens of words."""
    found = torch.ones(prompt.length)
    found[prompt.others] = 0
    return found
