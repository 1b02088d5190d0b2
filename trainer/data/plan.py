"""The step plan: which samples make micro-batch k, and which random numbers they meet, as pure
functions of (seed, k).

Nothing here depends on workers, ranks or anything drawn before, so a run's data state is one
integer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Slot:
    """One place in a batch: which sample, its place in the global batch, and its weight in the
    loss."""

    index: int
    place: int
    weight: float


@dataclass(frozen=True)
class Plan:
    """groups: index ranges that share every batch by `shares`; weights: each group's weight in the
    loss.

    Each group runs through its own shuffled epochs. The loss is sum over groups of weight * mean
    over its samples, whatever the shares.
    """

    groups: tuple[tuple[int, int], ...]
    shares: tuple[float, ...]
    weights: tuple[float, ...]
    batch_size: int
    seed: int

    def counts(self) -> list[int]:
        """Samples of each group in a batch: rounded shares, at least one of each, together
        `batch_size`."""
        counts = [max(1, round(share * self.batch_size)) for share in self.shares]
        if self.batch_size < len(self.groups):
            raise ValueError(
                f"run.batch_size={self.batch_size} is too small for {len(self.groups)} groups of "
                "data; "
                f"give at least {len(self.groups)}"
            )
        while sum(counts) != self.batch_size:  # the largest group takes what rounding left over
            counts[counts.index(max(counts))] += 1 if sum(counts) < self.batch_size else -1
        return counts

    def batch(self, step: int) -> list[Slot]:
        """The global micro-batch number `step`, groups interleaved so that every rank gets its part
        of each."""
        slots: list[tuple[float, int, float]] = []
        for group, ((start, stop), count, weight) in enumerate(
            zip(self.groups, self.counts(), self.weights, strict=True)
        ):
            for i in range(count):
                epoch, position = divmod(step * count + i, stop - start)
                index = start + int(_permutation(self.seed, group, epoch, stop - start)[position])
                slots.append(((i + 0.5) / count, index, weight * self.batch_size / count))
        slots.sort(key=lambda slot: slot[0])
        return [Slot(index, place, weight) for place, (_, index, weight) in enumerate(slots)]

    def local(self, step: int, rank: int, world_size: int) -> list[Slot]:
        """Rank `rank`'s part of the global micro-batch."""
        first, end = (self.batch_size * part // world_size for part in (rank, rank + 1))
        return self.batch(step)[first:end]


@lru_cache(maxsize=8)
def _permutation(seed: int, group: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, group, epoch)).permutation(size)


class Cursor:
    """A sampler over micro-steps: yields `start..total-1` but is `total` long, so a resumed loop
    counts right."""

    def __init__(self, total: int, start: int = 0) -> None:
        self.total, self.start = total, start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))

    def __len__(self) -> int:
        return self.total


def quantiles(count: int) -> Sequence[float]:
    """Midpoints of `count` equal parts of [0, 1): the fixed timesteps of the validation loss."""
    return [(i + 0.5) / count for i in range(count)]
