"""The samples of shards one after another, endlessly, as bytes: read lane by lane, shuffled in a
buffer by webdataset, and found again at any position.

A lane's run of an epoch is shuffled in blocks of `BUFFERS` buffers, each by random numbers of its
own. So what is at a position depends on the seed and the position alone, and a resumed run reads at
most a block of each lane again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from trainer.common.seeds import seed_of
from trainer.data.streams.lanes import Lanes
from trainer.data.streams.server_file import ShardFile
from trainer.data.streams.shard_samples import Raw, samples_of

BUFFERS = 16


@dataclass
class LanePlace:
    """Where a lane is: the sample at `place` of its run in `epoch` was read last."""

    epoch: int
    place: int
    rest: Iterator[Raw]
    last: Raw | None = None


class StreamOrder:
    """`order[position]` is a sample of the endless sequence. It is quick where each lane is asked
    for one position after another.

    files: the shards; whole: how many samples each is known to hold, None where more may follow
    those that `lanes` counts; buffer: samples that are shuffled at once in all lanes together, 0
    for none.
    """

    def __init__(
        self,
        files: Sequence[ShardFile],
        lanes: Lanes,
        *,
        whole: Sequence[int | None],
        buffer: int,
        ignore: Sequence[str] = (),
    ) -> None:
        self.files, self.lanes, self.whole, self.ignore = files, lanes, whole, ignore
        self.buffer = -(-buffer // lanes.number)
        self.cursors: dict[int, LanePlace] = {}

    def __getitem__(self, position: int) -> Raw:
        """Raises ValueError, ImageError or NoAnswerError as `samples_of`."""
        lane, taken = self.lanes.place(position)
        epoch = position // self.lanes.total
        place = taken - self.lanes.before(lane, epoch * self.lanes.total)
        cursor = self._cursor(lane, epoch, place)
        while cursor.place < place:
            cursor.last = next(cursor.rest)
            cursor.place += 1
        assert cursor.last is not None
        return cursor.last

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cursors": {}}

    def _cursor(self, lane: int, epoch: int, place: int) -> LanePlace:
        """The cursor of a lane, at a place or before it in the same block."""
        size = BUFFERS * max(1, self.buffer)
        found = self.cursors.get(lane)
        if found is not None and found.epoch == epoch and 0 <= place - found.place <= size:
            return found
        block = place // size
        rest = self._blocks(lane, epoch, block=block, size=size)
        self.cursors[lane] = LanePlace(epoch, block * size - 1, rest)
        return self.cursors[lane]

    def _blocks(self, lane: int, epoch: int, *, block: int, size: int) -> Iterator[Raw]:
        """The samples of a lane's run from a block on."""
        from webdataset.filters import shuffle  # which imports torch

        first, end = self.lanes.run(lane, epoch)
        raw = self._in_order(epoch, first + block * size, end)
        for number in range(block, -(-(end - first) // size)):
            rng = random.Random(seed_of(self.lanes.seed, "buffer", epoch, lane, number))
            stage = shuffle(max(1, self.buffer), initial=max(1, self.buffer), rng=rng)
            yield from stage(islice(raw, size))

    def _in_order(self, epoch: int, first: int, end: int) -> Iterator[Raw]:
        for piece in self.lanes.pieces(epoch, first, end):
            yield from samples_of(
                self.files[piece.shard],
                piece.first,
                piece.end,
                count=self.whole[piece.shard],
                ignore=self.ignore,
            )
