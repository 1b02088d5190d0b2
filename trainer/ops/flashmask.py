"""Attention with a column-interval mask, as an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.attention.op import Traits
from trainer.attention.op_conflicts import refuse_other_keys
from trainer.kernels.flashmask import BACK_ENDS, FEW, both
from trainer.kernels.mask_spec import MaskSpec
from trainer.kernels.softmax import sdpa

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
