"""The bounds of options that several data sources have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError
from trainer.data.source import frames_asked
from trainer.data.sources.video import Video
from trainer.data.sources.world_clips import WorldClips


def test_buckets_are_not_negative(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    words = ["recipe=linear_swap", "data.source=folder", f"data.folder={tmp_path}"]
    words += ["data.count=null", "data.validation=0", "data.template=a cat"]
    assert load_recipe([*words, "data.buckets=0"]).data.buckets == 0
    with pytest.raises(RecipeError, match=r"data\.buckets=-1: a whole number .*, at least 0"):
        load_recipe([*words, "data.buckets=-1"])


@pytest.mark.parametrize(
    ("data", "frames"),
    [
        ({"source": "world_clips"}, WorldClips.model_fields["frames"].default),
        ({"source": "video", "video": "a.mp4"}, Video.model_fields["frames"].default),
        ({"source": "world_clips", "frames": 3}, 3),
        ({"source": "video", "frames": 1}, 1),
        ({"source": "concept"}, 1),
        ({}, 1),
    ],
)
def test_frames_that_a_stored_recipe_asks_for(data: dict[str, Any], frames: int) -> None:
    assert frames_asked(data) == frames
