"""The lanes against a plain count: every sample once an epoch, runs side by side, and a place for
each position that depends on nothing else."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from trainer.data.streams.lanes import Lanes, Piece


def drawn(number: int) -> Lanes:
    rng = random.Random(number)
    counts = (3, *(rng.randrange(9) for _ in range(rng.randrange(1, 12))))
    rows, ranks, workers = (rng.randrange(1, 9) for _ in range(3))
    return Lanes(counts, rows, ranks, workers=workers, seed=number)


def sample_at(lanes: Lanes, position: int) -> tuple[int, int]:
    lane, taken = lanes.place(position)
    epoch = position // lanes.total
    first, end = lanes.run(lane, epoch)
    place = first + taken - lanes.before(lane, epoch * lanes.total)
    assert first <= place < end
    (piece,) = lanes.pieces(epoch, place, place + 1)
    assert piece.end == piece.first + 1
    return piece.shard, piece.first


@pytest.mark.parametrize("number", range(25))
def test_each_sample_is_once_in_every_epoch(number: int) -> None:
    lanes = drawn(number)
    every = sorted((s, i) for s, count in enumerate(lanes.counts) for i in range(count))
    epochs = []
    for epoch in range(3):
        positions = range(epoch * lanes.total, (epoch + 1) * lanes.total)
        epochs.append([sample_at(lanes, position) for position in positions])
        assert sorted(epochs[-1]) == every
    if len(every) > 12:
        assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("number", range(8))
def test_places_are_those_of_a_plain_count(number: int) -> None:
    lanes = drawn(number)
    own, taken = lanes.rows // lanes.parts, Counter[int]()
    for position in range(5 * lanes.rows * lanes.workers):
        step, row = divmod(position, lanes.rows)
        lane = step % lanes.workers * lanes.parts + row // own
        assert lanes.place(position) == (lane, taken[lane])
        for each in range(lanes.number):
            assert lanes.before(each, position) == taken[each]
        taken[lane] += 1


def test_ranks_and_workers_that_divide_share_no_lane() -> None:
    lanes = Lanes((100,), 8, 4, workers=4, seed=0)
    for ranks, workers in ((2, 2), (4, 4), (1, 2), (2, 4)):
        read: dict[int, set[tuple[int, int]]] = {}
        for position in range(8 * 40):
            step, row = divmod(position, 8)
            reader = row // (8 // ranks), step % workers
            read.setdefault(lanes.place(position)[0], set()).add(reader)
        assert all(len(readers) == 1 for readers in read.values())


def test_pieces_lie_shard_after_shard() -> None:
    lanes = Lanes((4, 0, 3, 5), 2, 1, workers=1, seed=2)
    whole = list(lanes.pieces(0, 0, 12))
    assert sorted(whole, key=lambda piece: piece.shard) == [
        Piece(0, 0, 4), Piece(2, 0, 3), Piece(3, 0, 5)
    ]  # fmt: skip
    first = whole[0]
    assert list(lanes.pieces(0, 1, first.end + 1)) == [
        Piece(first.shard, 1, first.end), Piece(whole[1].shard, 0, 1)
    ]  # fmt: skip
    assert [p.shard for p in lanes.pieces(1, 0, 12)] != [p.shard for p in whole] or [
        p.shard for p in lanes.pieces(2, 0, 12)
    ] != [p.shard for p in whole]
