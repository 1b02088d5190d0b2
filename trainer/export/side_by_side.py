"""Low-rank deltas of layers that another tool keeps as one: put side by side, and taken apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from trainer.backbones.four_bits import unpacked
from trainer.export.apply_bundle import layer_at
from trainer.export.bundle import DoRADelta, LowRankDelta
from trainer.export.layer_names import kohya_fused

Pair = LowRankDelta | DoRADelta


def by_key(layers: Mapping[str, Pair], keys: Mapping[str, str], base: Any) -> dict[str, Pair]:
    """Layers by sd-scripts' keys instead of their module paths; keys: of those with one of their
    own."""
    found = {keys[path]: delta for path, delta in layers.items() if path in keys}
    for key, paths in kohya_fused(base).items():
        own = [layers.get(path) for path in paths]
        if any(own):
            rows = [len(_weight(base, path)) for path in paths]
            found[key] = side_by_side(own, rows)
    return found


def _weight(base: Any, path: str) -> Any:
    layer: Any = unpacked(layer_at(base, path))
    return layer.weight


def side_by_side(deltas: Sequence[Pair | None], rows: Sequence[int]) -> LowRankDelta:
    """One delta of a layer whose rows are those of several, of which some have none: their `down`
    one below the other, and `up` in blocks. A `down` that all have in common is there once.

    deltas: down (r, in), up (rows, r) each. Returns down (R, in), up (sum of rows, R).
    """
    have = [delta for delta in deltas if delta is not None]
    first = have[0].down
    ups = [delta.up if delta.scale == 1 else delta.up * delta.scale for delta in have]
    if len(have) == len(deltas) and all(torch.equal(first, delta.down) for delta in have):
        return LowRankDelta(first, torch.cat(ups))
    own = iter(ups)
    blocks = [
        first.new_zeros(count, 0) if delta is None else next(own)
        for delta, count in zip(deltas, rows, strict=True)
    ]
    return LowRankDelta(torch.cat([delta.down for delta in have]), torch.block_diag(*blocks))


def apart(delta: LowRankDelta, rows: Sequence[int]) -> list[LowRankDelta]:
    """A delta's rows in runs of these sizes, each without the ranks that it has only zeros for."""
    return [_without_zeros(replace(delta, up=up)) for up in delta.up.split(list(rows))]


def _without_zeros(delta: LowRankDelta) -> LowRankDelta:
    """At least one rank stays."""
    used = (
        delta.up.flatten(2).abs().sum(-1).any(dim=0) if delta.up.ndim > 2 else delta.up.any(dim=0)
    )
    if used.all():
        return delta
    used[0] |= not used.any()
    return replace(delta, down=delta.down[used], up=delta.up[:, used])
