"""Softmax attention by a chosen back end of torch, as an op."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.attention.op import Traits
from trainer.kernels.flash import backend_of, describe, flash_attention, log, observed

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall


class FlashOp:
    """A kernel op: SDPA by one backend, or by PyTorch's choice for `None`.

    The first call with tensors of a kind is observed and logged: `ran` holds the backends by site.
    """

    name = "flash"
    traits = Traits(owner="flash")

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend
        self.ran: dict[str, dict[Hashable, str]] = {}

    def report(self) -> dict[str, tuple[str, ...]]:
        """The backends that ran at each site that was reached, in the order of their first run."""
        return {site: tuple(dict.fromkeys(kinds.values())) for site, kinds in self.ran.items()}

    @torch.compiler.disable
    def kernel(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: SiteCall
    ) -> Tensor:
        scale = call.scale
        known = self.ran.setdefault(call.site.name, {})
        kind = tuple(backend_of(x) for x in (q, k, v, mask))
        if kind in known:
            return flash_attention(q, k, v, mask=mask, scale=scale, backend=self.backend)
        try:
            o, known[kind] = observed(q, k, v, mask=mask, scale=scale, backend=self.backend)
        except ValueError as error:
            raise ValueError(f"methods.flash at {call.site.name}: {error}") from error
        log.info(
            "%s: %s ran for q %s, mask %s", call.site.name, known[kind], describe(q), describe(mask)
        )
        return o
