"""What is known of a clip: its frames by number, and means over squares of latents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.diffusion.known_frames import KnownFrames, without


def clips(frames: int = 5) -> Tensor:
    return torch.randn(2, frames, 3, 4, 6, generator=torch.Generator().manual_seed(frames))


def test_frames_are_seen_by_their_numbers() -> None:
    whole = clips()
    known = KnownFrames(whole[:, [3, 0]], (3, 0))
    assert torch.equal(known.seen_in(whole), known.latents)
    assert not torch.equal(known.seen_in(whole.flip(1)), known.latents)


def test_shrinking_takes_means_over_squares() -> None:
    whole = clips()
    known = KnownFrames.shrunk(whole[:, 1:3], (1, 2), 2)
    wanted = torch.empty(2, 2, 3, 2, 3)
    for row in range(2):
        for column in range(3):
            square = whole[:, 1:3, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            wanted[..., row, column] = square.mean((-1, -2))
    torch.testing.assert_close(known.latents, wanted)
    torch.testing.assert_close(known.seen_in(whole), wanted)


def test_a_block_knows_its_own_frames_by_its_own_numbers() -> None:
    whole = clips(9)
    known = KnownFrames(whole[:, ::4], (0, 4, 8))
    part = known.within(range(3, 8))
    assert part is not None and part.at == (1,)
    assert torch.equal(part.latents, whole[:, [4]])
    assert known.within(range(5, 8)) is None
    rest = without(known, range(4))
    assert rest is not None and rest.at == (4, 8) and torch.equal(rest.latents, whole[:, [4, 8]])
    assert without(known, range(9)) is None


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"5 known frames with the numbers \[0, 1\]; give each"):
        KnownFrames(clips(), (0, 1))
    with pytest.raises(ValueError, match="give each frame a number of its own"):
        KnownFrames(clips(2), (1, 1))
    with pytest.raises(ValueError, match="shrink=4 does not divide latents of 6x4"):
        KnownFrames.shrunk(clips(), (0, 1, 2, 3, 4), 4)
