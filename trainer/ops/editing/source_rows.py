"""Which rows of a batch are an edit's, and which those of its source, in each half of guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from trainer.attention.rows import SOURCE_BRANCH, TARGET_BRANCH, TEXTS

if TYPE_CHECKING:
    from trainer.attention.context import StepContext

Half = tuple[slice, slice]  # the rows of the source, and of the edit


def halves(ctx: StepContext) -> list[Half]:
    """The conditional rows, then the unconditional ones where there are any. A source that is not
    guided, as one that was inverted, has conditional rows alone: they serve both."""
    slices = ctx.groups.slices
    found = []
    for text in TEXTS:
        own = slices.get(f"{TARGET_BRANCH}/{text}")
        source = slices.get(f"{SOURCE_BRANCH}/{text}", slices.get(f"{SOURCE_BRANCH}/cond"))
        if own is not None and source is not None:
            found.append((source, own))
    return found


def with_source(x: Tensor, pairs: Sequence[Half], tokens: slice) -> Tensor:
    """x (rows, heads, n, d) with the source's values in the edit's rows, at these tokens."""
    found = x.clone()
    for source, own in pairs:
        found[own, :, tokens] = x[source, :, tokens]
    return found
