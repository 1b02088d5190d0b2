"""Keeps cross-attention maps of chosen words, to be drawn over previews or compared to masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.attention.op import Traits

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall


class MapStore:
    """An op that reads probabilities and keeps the columns of `tokens`, averaged over heads, on the
    CPU.

    `tokens` are positions in the context: one list for all batch rows, or one list per row, (rows,
    tokens), since a word has another position in every caption. With a `group`, as `target/cond`,
    the rows are those of this group, and a call without it is ignored. Sites with more than
    `max_queries` query tokens keep their fused kernel and are left out: eight heads of a 64x64 self
    map are 268 MB a row in half precision.

    `maps` has one (rows, tokens, h, w) float32 tensor per (step, site name). A repeated step
    overwrites: the recompute of gradient checkpointing adds nothing, and a sampler must set
    `StepContext.step`.
    """

    name = "map_store"
    traits = Traits(scores=True)

    def __init__(
        self,
        tokens: Sequence[int] | Sequence[Sequence[int]] | Tensor,
        max_queries: int = 32 * 32,
        group: str | None = None,
    ) -> None:
        self.tokens = torch.as_tensor(tokens, dtype=torch.long)
        if self.tokens.ndim not in (1, 2) or self.tokens.numel() == 0:
            raise ValueError(
                "MapStore needs token positions: a list of them, or one list per batch row"
            )
        self.max_queries, self.group = max_queries, group
        self.maps: dict[tuple[int, str], Tensor] = {}

    def gate(self, q: Tensor, call: SiteCall) -> bool:
        return q.shape[2] <= self.max_queries

    @torch.compiler.disable  # it reads the step: compiled, every step would recompile
    def probs(self, probs: Tensor, call: SiteCall) -> Tensor:
        ctx = call.ctx
        if self.group is not None and self.group not in ctx.groups.slices:
            return probs
        if probs.shape[2] <= self.max_queries:
            call.spans(probs.shape[-1], keys=True)  # refuses keys of which it is not known
            own = probs if self.group is None else probs[ctx.rows(self.group)]
            columns = self._columns(own.detach().mean(dim=1))  # b t n
            size = call.grid(columns.shape[-1], "MapStore")
            self.maps[ctx.step, call.site.name] = columns.unflatten(-1, size).float().cpu()
        return probs

    def clear(self) -> None:
        self.maps.clear()

    def average(self, size: tuple[int, int]) -> Tensor:
        """Mean over sites and steps, resized bilinearly to `size`: (rows, tokens, h, w)."""
        if not self.maps:
            raise ValueError(
                "MapStore holds no maps; install it on cross sites and run the denoiser first"
            )
        total = torch.zeros(())
        for maps in self.maps.values():
            total = total + F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
        return total / len(self.maps)

    def _columns(self, probs: Tensor) -> Tensor:
        """(b, n, m) -> (b, tokens, n)"""
        rows, queries, keys = probs.shape
        if int(self.tokens.max()) >= keys:
            raise ValueError(
                f"MapStore: token {int(self.tokens.max())} is outside a context of {keys} tokens"
            )
        if self.tokens.ndim == 2 and len(self.tokens) != rows:
            raise ValueError(
                f"MapStore has tokens for {len(self.tokens)} batch rows, the batch has {rows}"
            )
        index = self.tokens.to(probs.device).expand(rows, -1)  # b t
        return probs.gather(2, index[:, None].expand(-1, queries, -1)).transpose(1, 2)
