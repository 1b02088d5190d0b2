"""Clips and images in one data set: which sample is which, and how often each is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.mixed import Mixed, Stills
from trainer.data.source import Needs, shape_of_clips
from trainer.data.sources.world import Scenes
from trainer.data.sources.world_clips import WorldClips

RNG = np.random.default_rng(0)
CLIPS, STILLS, FRAMES = 3, 5, 4


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    needs = Needs(64, 4, lambda *_: (), tmp_path_factory.mktemp("cache"), lambda: "tiny")
    source = WorldClips(count=CLIPS, frames=FRAMES, fps=8, validation=0)
    clips, held_out = source.open(needs)
    assert held_out is None
    return clips, Scenes(2, count=STILLS, sprites="known", side=64)


def test_the_images_follow_the_clips(parts: tuple[Any, Any]) -> None:
    clips, stills = parts
    mixed = Mixed(clips, stills, 0.25)
    assert len(mixed) == CLIPS + STILLS
    assert mixed.groups == [range(CLIPS), range(CLIPS, CLIPS + STILLS)]
    assert mixed.shares == [0.75, 0.25]
    assert mixed.frames == [FRAMES, 1]
    for index in range(CLIPS + STILLS):
        own = clips if index < CLIPS else stills
        at = index if index < CLIPS else index - CLIPS
        assert mixed.image(index).equal(own.image(at))
        assert mixed.key(index) == own.key(at)
        assert mixed.sample(index, RNG).image.equal(own.sample(at, RNG).image)


def test_the_shape_is_that_of_the_clips(parts: tuple[Any, Any], tmp_path: Path) -> None:
    clips, stills = parts
    assert shape_of_clips(Mixed(clips, stills, 0.25)) == (FRAMES, 8)
    assert shape_of_clips(clips) == (FRAMES, 8)
    assert shape_of_clips(stills) == (1, None)


def test_stills_have_a_number_of_frames_for_each_group(parts: tuple[Any, Any]) -> None:
    """As a data set of clips in several sizes has."""
    clips, _ = parts
    stilled = Stills(Mixed(clips, clips, 0.5))
    assert [len(group) for group in stilled.groups] == [CLIPS, CLIPS]
    assert list(stilled.frames) == [1, 1] and len(stilled) == 2 * CLIPS
    assert stilled.image(0).equal(clips.image(0)[FRAMES // 2])
