"""The step plan: which samples make micro-batch k, as a pure function of (seed, k).

Nothing here depends on workers, ranks or earlier random numbers, so the state of a run's data is
one integer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from trainer.data.far_shuffle import far_key, far_place

# samples of an epoch above which its order is calculated and not stored: 8 MB of numbers
STORED = 2**20
CYCLE = 100  # batches in which every kind gets its share of batches, if the groups have no sizes


@dataclass(frozen=True)
class Slot:
    """One row of a batch: the index of its sample, its place in the global batch, and its weight in
    the loss."""

    index: int
    place: int
    weight: float


@dataclass(frozen=True)
class StepPlan:
    """Which samples of which group make each batch.

    groups: index ranges (start, stop); shares: the part of every batch that each group gets;
    weights: each group's weight in the loss. Each group is shuffled anew in each of its epochs. The
    loss is the sum over groups of weight * mean over the group's samples, whatever the shares.

    repeats: how often each sample is in an epoch, empty for once.

    in_order: the data shuffle themselves: the samples of epoch e are in their order, as indices to
    which e times the number of all samples is added, see `Ordered`.

    frames, sizes: of the samples of each group, empty if they are all the same. Samples that differ
    in them are a different kind and are never in one batch: the kinds take turns, and a kind makes
    as many batches as its share says. With sizes, turns are planned for an epoch of all samples;
    samples that do not fill a batch are used in the next epoch.
    """

    groups: tuple[tuple[int, int], ...]
    shares: tuple[float, ...]
    weights: tuple[float, ...]
    batch_size: int
    seed: int
    frames: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    repeats: tuple[int, ...] = ()
    in_order: bool = False

    def counts(self) -> list[int]:
        """How many samples of each group a batch of all groups has, see `rows_of`."""
        return rows_of(self.shares, self.batch_size)

    def turn(self, step: int) -> tuple[list[int], int]:
        """The groups that make batch `step`, and how many batches they made before it."""
        own = self._kinds()
        kinds = sorted(set(own))
        if len(kinds) < 2:
            return list(range(len(self.groups))), step
        groups = [[g for g, kind in enumerate(own) if kind == each] for each in kinds]
        samples = sum(len(self._epoch(group)) for group in range(len(self.groups)))
        length = samples / self.batch_size if self.sizes else CYCLE
        rates = [sum(self.shares[g] for g in those) * length for those in groups]
        cycle = int(step / length)
        while sum(_turns(rate, cycle + 1) for rate in rates) <= step:
            cycle += 1
        before = [_turns(rate, cycle) for rate in rates]
        turns = [_turns(rate, cycle + 1) - had for rate, had in zip(rates, before, strict=True)]
        order = np.repeat(range(len(kinds)), turns)
        order = order[
            _permutation(seed=self.seed, group=len(self.groups), epoch=cycle, size=len(order))
        ]
        place = step - sum(before)
        now = int(order[place])
        return groups[now], before[now] + int((order[:place] == now).sum())

    def batch(self, step: int) -> list[Slot]:
        """The global micro-batch number `step`. Groups are interleaved, so that every rank gets a
        part of each."""
        return self.local(step, rank=0, world_size=1)

    def local(self, step: int, rank: int, world_size: int) -> list[Slot]:
        """Rank `rank`'s part of the global micro-batch; the other parts are not looked at."""
        first, end = (self.batch_size * part // world_size for part in (rank, rank + 1))
        groups, turn = self.turn(step)
        shares = [self.shares[group] for group in groups]
        if len(groups) < len(self.groups):  # these groups fill the complete batch
            shares = [share / sum(shares) for share in shares]
        counts = rows_of(shares, self.batch_size)
        slots = []
        for place, (which, i) in enumerate(_interleaved(tuple(counts))[first:end], first):
            group, count = groups[which], counts[which]
            index = self._index(group, turn * count + i)
            slots.append(Slot(index, place, self.weights[group] * self.batch_size / count))
        return slots

    def _index(self, group: int, position: int) -> int:
        """The sample at a position of a group's epochs, one after another."""
        epoch_of = self._epoch(group)
        epoch, place = divmod(position, len(epoch_of))
        if self.in_order:
            return int(epoch_of[place]) + epoch * self.groups[-1][1]
        size = len(epoch_of)
        if size > STORED:
            return int(epoch_of[far_place(place, size, far_key(self.seed, group, epoch))])
        order = _permutation(seed=self.seed, group=group, epoch=epoch, size=size)
        return int(epoch_of[int(order[place])])

    def _epoch(self, group: int) -> range | np.ndarray:
        """The samples of one epoch of a group, in their own order, each as often as it repeats."""
        start, stop = self.groups[group]
        return _repeated(start, self.repeats[start:stop]) if self.repeats else range(start, stop)

    def _kinds(self) -> list[tuple[int, tuple[int, int]]]:
        """Frames and size of each group."""
        frames = self.frames or (1,) * len(self.groups)
        sizes = self.sizes or ((0, 0),) * len(self.groups)
        return list(zip(frames, sizes, strict=True))


def rows_of(shares: Sequence[float], total: int) -> list[int]:
    """`total` divided by shares, rounded, at least one for each share.

    Raises:
        ValueError: there are more shares than `total`.
    """
    if total < len(shares):
        raise ValueError(
            f"run.batch_size={total} is too small for {len(shares)} groups of data; "
            f"give at least {len(shares)}"
        )
    counts = [max(1, round(share * total)) for share in shares]
    while sum(counts) != total:  # the largest group gets the rest from rounding
        counts[counts.index(max(counts))] += 1 if sum(counts) < total else -1
    return counts


@lru_cache(maxsize=16)
def _interleaved(counts: tuple[int, ...]) -> Sequence[tuple[int, int]]:
    """The rows of a batch: which of the groups each is of, and its number among that group's; the
    rows of every group are spread over the batch."""
    if len(counts) == 1:
        return [(0, i) for i in range(counts[0])]
    rows = [(which, i) for which, count in enumerate(counts) for i in range(count)]
    return sorted(rows, key=lambda row: (row[1] + 0.5) / counts[row[0]])


def _turns(rate: float, cycles: int) -> int:
    """Complete batches of a kind in so many cycles; a fraction adds up over later cycles."""
    return int(rate * cycles + 1e-6)


@lru_cache(maxsize=16)
def _permutation(seed: int, group: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, group, epoch)).permutation(size)


@lru_cache(maxsize=16)
def _repeated(start: int, repeats: tuple[int, ...]) -> np.ndarray:
    return np.repeat(np.arange(start, start + len(repeats)), repeats)


class Cursor:
    """A sampler over micro-steps `start..total-1`. Its length is `total`, so that a resumed loop
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
