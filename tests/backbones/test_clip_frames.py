"""Frames of pixels and of latents."""

from __future__ import annotations

import pytest

from trainer.backbones.clip_frames import ClipFrames


def test_pictures_have_a_latent_frame_each() -> None:
    known = ClipFrames()
    assert not known.in_time
    assert [known.latent(frames) for frames in (1, 2, 7, 16)] == [1, 2, 7, 16]
    assert [known.shown(frames) for frames in (1, 2, 7)] == [1, 2, 7]


@pytest.mark.parametrize("per_latent", [2, 4, 8])
def test_the_first_frame_has_a_latent_frame_of_its_own(per_latent: int) -> None:
    known = ClipFrames(per_latent)
    assert known.in_time
    for k in range(4):
        frames = 1 + k * per_latent
        assert known.latent(frames) == 1 + k and known.shown(1 + k) == frames


@pytest.mark.parametrize(
    ("known", "frames", "near"),
    [
        (ClipFrames(4), 2, "1 or 5"),
        (ClipFrames(4), 12, "9 or 13"),
        (ClipFrames(4), 16, "13 or 17"),
        (ClipFrames(4, step=8), 5, "1 or 9"),
        (ClipFrames(4, step=8), 16, "9 or 17"),
        (ClipFrames(8), 24, "17 or 25"),
    ],
)
def test_others_are_refused_with_the_nearest(known: ClipFrames, frames: int, near: str) -> None:
    text = f"data.frames={frames}: this backbone takes clips of a multiple of .* and one more; "
    with pytest.raises(ValueError, match=f"{text}give {near}$"):
        known.check(frames, "data.frames")
    with pytest.raises(ValueError, match=f"^frames={frames}: "):
        known.latent(frames)
