"""The captions of video files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.data.video_captions import caption_beside
from trainer.media.images import ImageError


def test_a_text_file_comes_before_a_json(tmp_path: Path) -> None:
    video = tmp_path / "dance.mp4"
    assert caption_beside(video) is None
    video.with_suffix(".json").write_text(json.dumps({"caption": " a man dances "}))
    assert caption_beside(video) == "a man dances"
    video.with_suffix(".txt").write_text("a woman dances\n")
    assert caption_beside(video) == "a woman dances"


@pytest.mark.parametrize("data", [{}, {"caption": 3}, {"caption": None}, {"text": "a man"}])
def test_a_json_without_a_caption_is_refused(data: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "dance.json").write_text(json.dumps(data))
    with pytest.raises(ImageError, match=r"dance\.json has no caption; .* dance\.txt beside it"):
        caption_beside(tmp_path / "dance.mp4")
