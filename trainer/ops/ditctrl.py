"""DiTCtrl: edits in transformers whose text and image share one sequence, by keys and values of the
source, masked by where its words are, and by weights of words.

    O = Attn(Q, K_s, V_s)                        text and image tokens
    O = M O_f + (1 - M) O_b at image tokens      O_f, O_b over image keys in, outside of M_s
    A <- A w_j at word j, from image to text and from text to image

Cai et al., CVPR 2025, arXiv 2412.18597, section 3.3: M and M_s are the maps of words, image queries
to text keys, as a mean over heads, scaled to 1 and cut at 0.3; weights are not scaled to keep the
sum at 1. In each half of guidance for itself, in late layers and early steps. At self-attention,
which has no text, keys and values alone are shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.attention.op import Op, Traits
from trainer.kernels.softmax import attention_probs, attention_scores
from trainer.ops.editing.grid_masks import seen_or_all
from trainer.ops.editing.installed import edited_sites, refuse_kernels
from trainer.ops.editing.source_rows import Half, halves, with_source
from trainer.ops.editing.step_window import Window, is_inside, refuse_empty
from trainer.ops.editing.word_maps import WordMaps, mask_above
from trainer.ops.editing.word_reader import SOURCE, TARGET, columns_of
from trainer.ops.editing.word_tools import factors

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.hooks import Sampler
    from trainer.attention.sites import Site


@dataclass(frozen=True)
class JointSharing:
    """sites, steps: where and when keys and values are shared; words: whose maps make the masks,
    None for no masks; weights: of words of the edit's prompt; threshold, tokens: of the masks, and
    the largest grid of them."""

    owner: str
    sites: str
    steps: Window = (0.04, 0.5)
    words: Sequence[str] | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    threshold: float = 0.3
    tokens: int = 64 * 64


class JointControl:
    """An op of joint and self-attention, put there while an edit is sampled."""

    def __init__(self, told: JointSharing) -> None:
        self.told = told
        self.name = f"{told.owner}_joint"
        self.traits = Traits(owner=told.owner, scores=True)
        self.columns: dict[str, Tensor] = {}
        self.weight: Tensor | None = None
        self.maps: dict[str, WordMaps] = {}
        self.used: dict[str, Tensor] = {}

    def begin(self, sampler: Sampler) -> Mapping[Op, Sequence[Site]]:
        told = self.told
        refuse_empty({"steps": told.steps}, sampler.steps)
        sites = edited_sites(sampler, told.sites, kinds=("joint", "self"), op=self)
        apart = [site for site in sites if site.kind != "joint"]
        if apart and (told.words is not None or told.weights):
            raise ValueError(
                "mask_words and word_weights are for layers whose text and image share one "
                f"sequence, and {apart[0].name} sees the image alone; leave them out, choose other "
                "sites, or another backbone"
            )
        refuse_kernels(sampler, sites, self)
        self.used = {}
        if told.words is not None:
            self.columns = columns_of(sampler, told.words)
            self.maps = {group: WordMaps(told.tokens, "mask_tokens") for group in self.columns}
        if told.weights:
            read = [sampler.read(prompt) for prompt in sampler.prompts]
            self.weight = torch.stack([factors(prompt, told.weights) for prompt in read])
        return {self: sites}

    def end(self) -> None:
        self.columns, self.maps, self.weight = {}, {}, None

    def shown(self) -> dict[str, Tensor]:
        return self.used

    @torch.compiler.disable  # it reads the step: compiled, every step would recompile
    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        pairs = halves(call.ctx) if is_inside(self.told.steps, call.ctx) else []
        if not pairs:
            return q, k, v
        if self.told.words is not None:
            call.scratch(self)["kv"] = (k, v)
            return q, k, v
        return q, with_source(k, pairs, slice(None)), with_source(v, pairs, slice(None))

    def gate(self, q: Tensor, call: SiteCall) -> bool:
        return self.weight is not None or self.told.words is not None

    @torch.compiler.disable
    def probs(self, probs: Tensor, call: SiteCall) -> Tensor:
        rows = call.ctx.groups.slices
        queries = call.spans(probs.shape[2]).image
        for group, columns in self.columns.items():
            if group in rows and self.maps[group].takes(queries.stop - queries.start):
                text = call.spans(probs.shape[3], keys=True).text
                own = probs[rows[group]][:, :, queries, text]
                who = f"methods.{self.told.owner}"
                known = of_text(columns, own.shape[-1], filled=0.0)
                self.maps[group].add_words(own, known, call=call, who=who)
        if self.weight is None or TARGET not in rows:
            return probs
        found = probs.clone()
        found[rows[TARGET]] = self._weighted(probs[rows[TARGET]], call)
        return found

    def _weighted(self, probs: Tensor, call: SiteCall) -> Tensor:
        """Maps (rows, heads, n, m) of an edit's conditional rows with the weights of words."""
        if self.weight is None:
            return probs
        spans = call.spans(probs.shape[3], keys=True)
        weight = of_text(self.weight, spans.text.stop - spans.text.start, filled=1.0)
        weight = weight.to(probs).repeat_interleave(len(probs) // len(weight), 0)
        found = probs.clone()
        found[:, :, spans.image, spans.text] *= weight[:, None, None]
        found[:, :, spans.text, spans.image] *= weight[:, None, :, None]
        return found

    @torch.compiler.disable
    def branch(self, o: Tensor, q: Tensor, call: SiteCall) -> Tensor:
        if "kv" not in call.scratch(self):
            return o
        k, v = call.scratch(self)["kv"]
        found, target = o.clone(), call.ctx.rows(TARGET)
        for pair in halves(call.ctx):
            parts = self._parts(q, k, v, pair=pair, call=call, weighs=pair[1] == target)
            found[pair[1]] = parts
        return found

    def _parts(
        self, q: Tensor, k: Tensor, v: Tensor, *, pair: Half, call: SiteCall, weighs: bool
    ) -> Tensor:
        """The output (rows, heads, n, d) of the rows of an edit, of two attentions by the masks."""
        source, own = pair
        scores = attention_scores(q[own], k[source], call.scale)
        queries = call.spans(q.shape[2]).image
        keys = call.spans(k.shape[2], keys=True).image
        inside, target = self._masks(call, queries.stop - queries.start)
        made = []
        for seen in (inside, ~inside):
            seen = seen_or_all(seen).to(q.device)
            mask = torch.ones(len(scores), 1, *scores.shape[2:], dtype=torch.bool, device=q.device)
            mask[:, :, queries, keys] = seen[:, None, None]
            probs = attention_probs(scores, mask).to(v.dtype)
            probs = self._weighted(probs, call) if weighs else probs
            made.append(probs @ v[source])
        found = made[0].clone()
        outside = ~target.to(q.device)[:, None, :, None]
        found[:, :, queries] = torch.where(outside, made[1][:, :, queries], made[0][:, :, queries])
        return found

    def _masks(self, call: SiteCall, tokens: int) -> tuple[Tensor, Tensor]:
        """Of the source and the edit, (rows, image tokens) of bool."""
        grid = call.grid(tokens, f"methods.{self.told.owner}")
        both = [
            mask_above(self.maps[group].average(), grid, self.told.threshold)[:, 0]
            for group in (SOURCE, TARGET)
        ]
        self.used = {"source mask": both[0].float(), "edit mask": both[1].float()}
        return both[0].flatten(1), both[1].flatten(1)


def of_text(values: Tensor, tokens: int, *, filled: float) -> Tensor:
    """Values of the tokens of prompts (b, m) for all tokens of text (b, tokens): where a model
    reads a prompt by several encoders, words are known in the first one's tokens.

    Raises:
        ValueError: fewer tokens than the prompts have.
    """
    more = tokens - values.shape[-1]
    if more < 0:
        raise ValueError(
            f"a prompt has {values.shape[-1]} tokens, and the sequence {tokens} of text; choose "
            "sites that see the whole text"
        )
    return F.pad(values, (0, more), value=filled)
