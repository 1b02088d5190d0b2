"""A layer of attention, or the feed-forward layer after it, runs on tokens that were merged."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from trainer.attention.op import Traits, label
from trainer.attention.op_conflicts import refuse_mask, refuse_other_keys
from trainer.kernels.token_merging import joined_heads, split_again

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall

PLAN = "plan"


class Merged(Protocol):
    """Which tokens are averaged into one, in one run of a layer. sizes (b, m): how many tokens each
    of those that are left stands for."""

    @property
    def sizes(self) -> Tensor: ...
    def merge(self, x: Tensor) -> Tensor:
        """(b, n, c) to (b, m, c)."""
        ...

    def unmerge(self, y: Tensor) -> Tensor:
        """(b, m, c) to (b, n, c)."""
        ...


class Planner(Protocol):
    """What a method merges by: from tokens (b, n, c) that lie on a grid, where the site runs, to
    what is merged; None for nothing."""

    def __call__(self, x: Tensor, grid: tuple[int, int], call: SiteCall) -> Merged | None: ...


class MergedInputs:
    """Around a layer: it gets merged tokens, and every token what it gives for those. Keys and
    values in self-attention are those of merged tokens; in attention to text only queries are."""

    def __init__(self, planner: Planner, owner: str) -> None:
        self.planner, self.name = planner, owner
        self.traits = Traits(owner=owner, grid=True, resizes=True)
        self.counts: dict[str, tuple[int, int]] = {}

    def tokens(self, x: Tensor, call: SiteCall) -> Tensor:
        plan = call.scratch(self)[PLAN] = _planned(self, x, call)
        return x if plan is None else plan.merge(x)

    def restore(self, y: Tensor, call: SiteCall) -> Tensor:
        plan = call.scratch(self)[PLAN]
        return y if plan is None else plan.unmerge(y)


class MergedHeads:
    """Inside a layer, whose positions are by the number of a token: queries, keys and values are
    merged after them, by the mean of the keys over heads as in ToMe (arXiv 2210.09461). Text in the
    same sequence is left as it is."""

    def __init__(self, planner: Planner, owner: str) -> None:
        self.planner, self.name = planner, owner
        self.traits = Traits(owner=owner, resizes=True)
        self.counts: dict[str, tuple[int, int]] = {}

    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        refuse_other_keys(q, k, op=self, call=call)
        own = call.scratch(self)
        image = call.spans(q.shape[2]).image
        plan = own[PLAN] = _planned(self, k[:, :, image].mean(1), call)
        if plan is None:
            return q, k, v
        own["image"] = slice(image.start, image.start + plan.sizes.shape[1])
        return (
            _changed(q, image, plan.merge),
            _changed(k, image, plan.merge),
            _changed(v, image, plan.merge),
        )

    def mask(self, mask: Tensor | None, q: Tensor, k: Tensor, call: SiteCall) -> Tensor | None:
        if call.scratch(self)[PLAN] is not None:
            refuse_mask(mask, self, call)
        return mask

    def output(self, o: Tensor, call: SiteCall) -> Tensor:
        own = call.scratch(self)
        return o if own[PLAN] is None else _changed(o, own["image"], own[PLAN].unmerge)


class MergedFeed:
    """Around the feed-forward layer of the block of a site."""

    def __init__(self, planner: Planner, owner: str) -> None:
        self.planner, self.name = planner, f"{owner}_feed"
        self.traits = Traits(owner=owner)
        self.counts: dict[str, tuple[int, int]] = {}

    def feed(self, x: Tensor, call: SiteCall) -> Tensor:
        plan = call.scratch(self)[PLAN] = _planned(self, x, call)
        return x if plan is None else plan.merge(x)

    def fed(self, y: Tensor, call: SiteCall) -> Tensor:
        plan = call.scratch(self)[PLAN]
        return y if plan is None else plan.unmerge(y)


class SizesAsBias:
    """Proportional attention (ToMe, arXiv 2210.09461, equation 1): a token that stands for s tokens
    counts s times, softmax(q k^T / sqrt(d) + log s). It reads the sizes of the op that merges."""

    def __init__(self, merging: MergedInputs | MergedHeads) -> None:
        self.merging, self.name = merging, f"{merging.name}_sizes"
        self.traits = Traits(owner=merging.name)

    def mask(self, mask: Tensor | None, q: Tensor, k: Tensor, call: SiteCall) -> Tensor | None:
        own = call.scratch(self.merging)
        if own[PLAN] is None:
            return mask
        refuse_mask(mask, self, call)
        refuse_other_keys(q, k, op=self, call=call)
        sizes = own[PLAN].sizes.log().to(q.dtype)
        bias = sizes.new_zeros(len(k), k.shape[2])
        bias[:, own.get("image", slice(None))] = sizes
        return bias[:, None, None].expand(-1, -1, q.shape[2], -1)


Merging = MergedInputs | MergedHeads | MergedFeed


def _planned(op: Merging, x: Tensor, call: SiteCall) -> Merged | None:
    """The plan for tokens (b, n, c) of a site; counts how many tokens it leaves."""
    grid = call.grid(x.shape[1], label(op))
    if x.shape[1] == 1:
        raise ValueError(
            f"{label(op)} merges tokens, and {call.site.name!r} has one; choose other sites, as in "
            "sites=self&/1, or a larger picture"
        )
    with torch.no_grad():
        plan = op.planner(x, grid, call)
    left = x.shape[1] if plan is None else plan.sizes.shape[1]
    op.counts[call.site.name] = (x.shape[1], left)
    return plan


def _changed(x: Tensor, image: slice, change: Callable[[Tensor], Tensor]) -> Tensor:
    """(b, h, n, d) with the tokens of the image changed, (b, n, h d) at once."""
    found = split_again(change(joined_heads(x[:, :, image])), x.shape[1])
    if image.start == 0 and image.stop == x.shape[2]:
        return found
    return torch.cat([x[:, :, : image.start], found, x[:, :, image.stop :]], dim=2)
