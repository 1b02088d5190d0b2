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

CYCLE = 100  # batches in which every kind has its share of the turns, if sizes do not part them


@dataclass(frozen=True)
class Slot:
    """One place in a batch: which sample, its place in the global batch, and its weight in the
    loss."""

    index: int
    place: int
    weight: float


@dataclass(frozen=True)
class StepPlan:
    """groups: index ranges that share every batch by `shares`; weights: each group's weight in the
    loss.

    Each group runs through its own shuffled epochs. The loss is sum over groups of weight * mean
    over its samples, whatever the shares.

    frames, sizes: of the samples of each group, empty if all are alike. Samples that are not make
    no batch together: such groups take turns, each kind as often as its share says. Buckets of
    sizes are planned by the epoch of all of them: what does not fill a batch waits for the next.
    """

    groups: tuple[tuple[int, int], ...]
    shares: tuple[float, ...]
    weights: tuple[float, ...]
    batch_size: int
    seed: int
    frames: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()

    def counts(self) -> list[int]:
        """Samples of each group in a batch that all of them share, see `_counts`."""
        return _counts(self.shares, self.batch_size)

    def turn(self, step: int) -> tuple[list[int], int]:
        """The groups that make batch `step`, and how many batches they have made before."""
        own = self._kinds()
        kinds = sorted(set(own))
        if len(kinds) < 2:
            return list(range(len(self.groups))), step
        groups = [[g for g, kind in enumerate(own) if kind == each] for each in kinds]
        samples = self.groups[-1][1] - self.groups[0][0]
        length = samples / self.batch_size if self.sizes else CYCLE
        rates = [sum(self.shares[g] for g in those) * length for those in groups]
        cycle = int(step / length)
        while sum(_turns(rate, cycle + 1) for rate in rates) <= step:
            cycle += 1
        before = [_turns(rate, cycle) for rate in rates]
        turns = [_turns(rate, cycle + 1) - had for rate, had in zip(rates, before, strict=True)]
        order = np.repeat(range(len(kinds)), turns)
        order = order[_permutation(self.seed, len(self.groups), cycle, len(order))]
        place = step - sum(before)
        now = int(order[place])
        return groups[now], before[now] + int((order[:place] == now).sum())

    def batch(self, step: int) -> list[Slot]:
        """The global micro-batch number `step`, groups interleaved so that every rank gets its part
        of each."""
        slots: list[tuple[float, int, float]] = []
        groups, turn = self.turn(step)
        shares = [self.shares[group] for group in groups]
        if len(groups) < len(self.groups):  # they have the whole batch to themselves
            shares = [share / sum(shares) for share in shares]
        counts = _counts(shares, self.batch_size)
        for group, count in zip(groups, counts, strict=True):
            (start, stop), weight = self.groups[group], self.weights[group]
            for i in range(count):
                epoch, position = divmod(turn * count + i, stop - start)
                index = start + int(_permutation(self.seed, group, epoch, stop - start)[position])
                slots.append(((i + 0.5) / count, index, weight * self.batch_size / count))
        slots.sort(key=lambda slot: slot[0])
        return [Slot(index, place, weight) for place, (_, index, weight) in enumerate(slots)]

    def _kinds(self) -> list[tuple[int, tuple[int, int]]]:
        """Frames and size of each group."""
        frames = self.frames or (1,) * len(self.groups)
        sizes = self.sizes or ((0, 0),) * len(self.groups)
        return list(zip(frames, sizes, strict=True))

    def local(self, step: int, rank: int, world_size: int) -> list[Slot]:
        """Rank `rank`'s part of the global micro-batch."""
        first, end = (self.batch_size * part // world_size for part in (rank, rank + 1))
        return self.batch(step)[first:end]


def _counts(shares: Sequence[float], total: int) -> list[int]:
    """`total` parted by shares: rounded, at least one of each.

    Raises:
        ValueError: there are more shares than things to part.
    """
    if total < len(shares):
        raise ValueError(
            f"run.batch_size={total} is too small for {len(shares)} groups of data; "
            f"give at least {len(shares)}"
        )
    counts = [max(1, round(share * total)) for share in shares]
    while sum(counts) != total:  # the largest group takes what rounding left over
        counts[counts.index(max(counts))] += 1 if sum(counts) < total else -1
    return counts


def _turns(rate: float, cycles: int) -> int:
    """Whole batches of a kind in so many cycles; what is left over is made up for in later ones."""
    return int(rate * cycles + 1e-6)


@lru_cache(maxsize=16)
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
