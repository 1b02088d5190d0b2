"""Which frames each block of a long clip has."""

from __future__ import annotations

from itertools import pairwise

import pytest

from trainer.diffusion.blocks import Blocks


@pytest.mark.parametrize(
    ("size", "overlap", "frames", "starts"),
    [
        (8, 4, 40, [0, 4, 8, 12, 16, 20, 24, 28, 32]),
        (8, 1, 15, [0, 7]),
        (8, 3, 16, [0, 5, 8]),  # the last ends with the clip
        (4, 2, 5, [0, 1]),
        (5, 4, 6, [0, 1]),
        (2, 1, 3, [0, 1]),
    ],
)
def test_blocks_cover_a_clip(size: int, overlap: int, frames: int, starts: list[int]) -> None:
    spans = Blocks(size, overlap).spans(frames)
    assert [span.start for span in spans] == starts
    assert {len(span) for span in spans} == {size}
    assert spans[-1].stop == frames
    for before, span in pairwise(spans):
        shared = before.stop - span.start
        assert overlap <= shared < size  # each goes on from the one before, and adds something
        assert shared == overlap or span is spans[-1]


def test_half_of_a_block_is_shared_where_nothing_is_said() -> None:
    assert [Blocks.of(size).overlap for size in (2, 3, 8, 9)] == [1, 1, 4, 4]
    assert Blocks.of(8, 2) == Blocks(8, 2)


@pytest.mark.parametrize(
    ("size", "overlap", "says"),
    [
        (1, 1, "block=1: give at least 2, one frame to go on from and a new one"),
        (8, 0, "overlap=0: blocks of 8 frames have 1 to 7 frames in common"),
        (8, 8, "overlap=8: blocks of 8 frames have 1 to 7 frames in common"),
    ],
)
def test_refused(size: int, overlap: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Blocks(size, overlap)
