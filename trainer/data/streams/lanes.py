"""How an endless sequence of samples is divided into lanes, each of which one data worker of one
rank reads from the shards that are its own.

Lane `turn * ranks + part` gives part number `part` of every batch whose number is `turn` modulo
`workers`. So a rank reads the lanes of its part of a batch, and one of its data workers those of
its batches, as long as their numbers divide `ranks` and `workers`; with other numbers a lane is
read by several. The sequence is the same with any. In each epoch the lanes divide the samples, in
the shuffled order of the shards, into runs that lie side by side, as long as an epoch takes of
them: so each sample is in an epoch once, whatever the numbers of shards and of their samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd

import numpy as np


@dataclass(frozen=True)
class Piece:
    """Samples `first` to `end - 1` of a shard, which is known by its number."""

    shard: int
    first: int
    end: int


@dataclass(frozen=True, eq=False)  # a hash of all counts would take longer than a step
class Lanes:
    """counts: the samples of each shard; rows: of these samples in a batch; ranks, workers: how
    many can read without reading what is another's; seed: of the order of the shards."""

    counts: tuple[int, ...]
    rows: int
    ranks: int
    workers: int
    seed: int

    @property
    def parts(self) -> int:
        """Parts of a batch, all of one size: the most that divide both its rows and `ranks`."""
        return gcd(self.rows, self.ranks)

    @property
    def number(self) -> int:
        return self.parts * self.workers

    @cached_property
    def total(self) -> int:
        """Samples of an epoch."""
        return sum(self.counts)

    def place(self, position: int) -> tuple[int, int]:
        """Which lane gives the sample at a position of the endless sequence, and how many that lane
        gave before it."""
        size = self.rows // self.parts
        turn, rest = divmod(position, self.rows * self.workers)
        batch, row = divmod(rest, self.rows)
        part, inside = divmod(row, size)
        return batch * self.parts + part, turn * size + inside

    def before(self, lane: int, position: int) -> int:
        """How many samples a lane gives before a position."""
        size = self.rows // self.parts
        turn, rest = divmod(position, self.rows * self.workers)
        start = lane // self.parts * self.rows + lane % self.parts * size
        return turn * size + min(max(rest - start, 0), size)

    def run(self, lane: int, epoch: int) -> tuple[int, int]:
        """The first and the end of a lane's run in the shuffled samples of an epoch."""
        firsts, ends = _runs(self, epoch)
        return int(firsts[lane]), int(ends[lane])

    def pieces(self, epoch: int, first: int, end: int) -> Iterator[Piece]:
        """Places `first` to `end - 1` of the shuffled samples of an epoch, shard after shard."""
        order, starts = _order(self, epoch)
        at = int(np.searchsorted(starts, first, side="right")) - 1
        while first < end:
            shard, start = int(order[at]), int(starts[at])
            stop = min(end, start + self.counts[shard])
            if stop > first:
                yield Piece(shard, first - start, stop - start)
            first, at = max(first, stop), at + 1


@lru_cache(maxsize=32)
def _runs(lanes: Lanes, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the run of each lane begins in an epoch, and where it ends; which lane is whose
    neighbour is drawn anew, so that no sample stays in one lane."""
    start, stop = (
        np.array([lanes.before(lane, at * lanes.total) for lane in range(lanes.number)])
        for at in (epoch, epoch + 1)
    )
    sizes = stop - start
    drawn = np.random.default_rng((lanes.seed, epoch, 1)).permutation(lanes.number)
    ends = np.empty_like(sizes)
    ends[drawn] = np.cumsum(sizes[drawn])
    return ends - sizes, ends


@lru_cache(maxsize=32)
def _order(lanes: Lanes, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The shards of an epoch in their shuffled order, and the place at which each begins."""
    order = np.random.default_rng((lanes.seed, epoch)).permutation(len(lanes.counts))
    sizes = np.asarray(lanes.counts)[order]
    return order, np.cumsum(sizes) - sizes
