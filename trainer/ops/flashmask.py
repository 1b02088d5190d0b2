"""Attention with a column-interval mask, as an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.attention.op import Traits, label
from trainer.attention.op_conflicts import refuse_mask, refuse_other_keys
from trainer.kernels.block_masks import BlockMask
from trainer.kernels.block_sparse import block_sparse
from trainer.kernels.flashmask import BACK_ENDS, FEW, both
from trainer.kernels.mask_spec import MaskSpec
from trainer.kernels.softmax import sdpa, softmax_attention

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall


class FlashMask:
    """A kernel op: attention under a mask of intervals that the number of tokens decides.

    make: from the number of tokens, and of frames in them, to the mask.
    """

    name = "flashmask"
    traits = Traits(owner="flashmask", more_keys=False, grid=True)

    def __init__(self, make: Callable[[int, int], MaskSpec], backend: str | None = None) -> None:
        self.make, self.backend = make, backend
        self.specs: dict[tuple[int, int, torch.device], MaskSpec] = {}

    @torch.compiler.disable
    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: SiteCall
    ) -> Tensor:
        scale = call.scale
        refuse_other_keys(q, k, op=self, call=call)
        spec = self._spec(q, call.ctx.frames)
        if mask is not None:
            # exact, but saves nothing: two masks are no intervals
            return sdpa(q, k, v, mask=both(mask, spec.dense()), scale=scale)
        few = "dense" if q.shape[2] <= FEW else "blockwise"
        backend = self.backend or ("flex" if q.is_cuda else few)
        return BACK_ENDS[backend](q, k, v, spec=spec, scale=scale)

    def _spec(self, q: Tensor, frames: int) -> MaskSpec:
        key = (q.shape[2], frames, q.device)
        if key not in self.specs:
            self.specs[key] = self.make(q.shape[2], frames).to(q.device)
        return self.specs[key]


class BlockMasked:
    """A kernel op: attention under a mask by blocks of the token grid.

    make: from the grid, and the frames of it that are in one sequence, to the mask. in_time:
    whether the tokens are those of all frames of a clip.
    """

    name = "flashmask"
    traits = Traits(owner="flashmask", masks=False, more_keys=False, grid=True)

    def __init__(self, make: Callable[[tuple[int, int], int], BlockMask], in_time: bool) -> None:
        self.make, self.in_time = make, in_time
        self.made: dict[tuple[tuple[int, int], int, torch.device], BlockMask] = {}

    @torch.compiler.disable
    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: SiteCall
    ) -> Tensor:
        refuse_mask(mask, self, call)
        refuse_other_keys(q, k, op=self, call=call)
        own = self._mask(q, call)
        if own.shown == 1:
            return softmax_attention(q, k, v, scale=call.scale)
        if own.order is None:
            return block_sparse(q, k, v, chosen=own.chosen, scale=call.scale)
        q, k, v = (x.index_select(2, own.order) for x in (q, k, v))
        o = block_sparse(q, k, v, chosen=own.chosen, scale=call.scale)
        return torch.empty_like(o).index_copy(2, own.order, o)

    def _mask(self, q: Tensor, call: SiteCall) -> BlockMask:
        tokens, frames = q.shape[2], call.ctx.frames if self.in_time else 1
        if self.in_time and (frames == 1 or tokens % frames):
            raise ValueError(
                f"{label(self)}: mask=radial needs the tokens of all frames of a clip in one "
                f"sequence, and {call.site.name!r} has {tokens} tokens for {frames} frames; choose "
                "a model of clips, and more frames than one"
            )
        grid = (1, tokens // frames) if self.in_time else call.grid(tokens, label(self))
        key = (grid, frames, q.device)
        if key not in self.made:
            self.made[key] = self.make(grid, frames).to(q.device)
        return self.made[key]
