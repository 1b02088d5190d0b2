"""MasaCtrl: the self-attention of an edit takes its keys and values from the source, so that what
the source shows is there in another pose or place.

    O = softmax(Q K_s^T / sqrt(d)) V_s                                   mutual
    O = softmax(Q [K_s; K]^T / sqrt(d)) [V_s; V]                         union
    O = M O_f + (1 - M) O_b,   O_f over keys inside M_s, O_b outside     mask

Cao et al., ICCV 2023, arXiv 2304.08465, section 3.2, equations 4 to 6: M the mask of the object in
the edit, M_s in the source, given by the user or (mask-auto) made of the cross-attention maps of
words. In each half of guidance for itself; from a step and a layer on. The rows of the source
never change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.attention.op import Op, Traits
from trainer.kernels.softmax import softmax_attention
from trainer.ops.editing.grid_masks import on_grid, seen_or_all
from trainer.ops.editing.installed import edited_sites, refuse_kernels
from trainer.ops.editing.source_rows import Half, halves, with_source
from trainer.ops.editing.step_window import Window, is_inside, refuse_empty
from trainer.ops.editing.word_maps import mask_above
from trainer.ops.editing.word_reader import SOURCE, TARGET, WordReader, columns_of, has_maps

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.hooks import Sampler
    from trainer.attention.sites import Site

MUTUAL, UNION, MASK, AUTO = "mutual", "union", "mask", "mask-auto"


@dataclass(frozen=True)
class Sharing:
    """share: one of the four ways above; sites, steps: where and when; words: whose maps make the
    masks, None for those that differ; threshold, mask_tokens: of these, see `mask_above`, and the
    largest grid of them."""

    owner: str
    sites: str
    share: str = MUTUAL
    steps: Window = (0.0, 1.0)
    words: Sequence[str] | None = None
    threshold: float = 0.1
    mask_tokens: int = 16 * 16


class MutualSelfAttention:
    """An op of self- and joint attention, put there while an edit is sampled."""

    def __init__(self, told: Sharing) -> None:
        self.told = told
        self.name = f"{told.owner}_sharing"
        self.traits = Traits(owner=told.owner)
        self.reader: WordReader | None = None
        self.given: dict[str, Tensor] = {}
        self.used: dict[str, Tensor] = {}

    def begin(self, sampler: Sampler) -> Mapping[Op, Sequence[Site]]:
        told = self.told
        refuse_empty({"steps": told.steps}, sampler.steps)
        # at joint attention the picture's keys alone would count twice beside those of the text
        kinds = ("self", "joint") if told.share == MUTUAL else ("self",)
        sites = edited_sites(sampler, told.sites, kinds=kinds, op=self)
        self.used = {}
        if told.share == MUTUAL:
            return {self: sites}
        refuse_kernels(sampler, sites, self)
        if told.share == MASK:
            own = {name: sampler.mask(name) for name in ("source", "target")}
            self.given = {name: mask for name, mask in own.items() if mask is not None}
            if len(self.given) < len(own):
                raise ValueError("share=mask needs the mask of the object; give mask=<a picture>")
        if told.share != AUTO:
            return {self: sites}
        self.reader = WordReader(
            told.owner, columns_of(sampler, told.words), told.mask_tokens, last=True
        )
        cross = [site for site in sampler.sites if site.kind == "cross"]
        cross = [site for site in cross if has_maps(sampler.host, site)]
        if not cross:
            raise ValueError(
                "share=mask-auto reads maps of cross-attention, and this model has none; give "
                "share=mask with mask=<a picture>"
            )
        return {self.reader: cross, self: sites}

    def end(self) -> None:
        self.reader = None
        self.given = {}

    def shown(self) -> dict[str, Tensor]:
        return self.used

    @torch.compiler.disable  # it reads the step: compiled, every step would recompile
    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        pairs = halves(call.ctx) if is_inside(self.told.steps, call.ctx) else []
        if not pairs:
            return q, k, v
        if self.told.share != MUTUAL:
            call.scratch(self)["kv"] = (k, v)
            return q, k, v
        image = call.spans(k.shape[2], keys=True).image
        return q, with_source(k, pairs, image), with_source(v, pairs, image)

    @torch.compiler.disable
    def branch(self, o: Tensor, q: Tensor, call: SiteCall) -> Tensor:
        if "kv" not in call.scratch(self):
            return o
        k, v = call.scratch(self)["kv"]
        found = o.clone()
        for pair in halves(call.ctx):
            found[pair[1]] = self._attended(q, k, v, pair=pair, call=call)
        return found

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, *, pair: Half, call: SiteCall) -> Tensor:
        """The output (rows, heads, n, d) of the rows of an edit."""
        source, own = pair
        q, k_s, v_s = q[own], k[source], v[source]
        if self.told.share == UNION:
            keys, values = torch.cat([k_s, k[own]], 2), torch.cat([v_s, v[own]], 2)
            return softmax_attention(q, keys, values, scale=call.scale)
        inside, target = self._masks(len(q), call.grid(q.shape[2], f"methods.{self.told.owner}"))
        inside, target = inside.to(q.device), target.to(q.device)
        fore, back = (
            softmax_attention(q, k_s, v_s, mask=seen_or_all(keys)[:, None, None], scale=call.scale)
            for keys in (inside, ~inside)
        )
        return torch.where(target[:, None, :, None], fore, back)

    def _masks(self, rows: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Of the source and the edit, (rows, h w) of bool."""
        if self.reader is None:
            both = [on_grid(self.given[name], grid, rows) for name in ("source", "target")]
        else:
            maps = [self.reader.maps[group].average() for group in (SOURCE, TARGET)]
            both = [mask_above(own, grid, self.told.threshold).flatten(1) for own in maps]
            names = ("source mask", "edit mask")
            self.used = {
                name: own.float().unflatten(1, grid) for name, own in zip(names, both, strict=True)
            }
        return both[0], both[1]
