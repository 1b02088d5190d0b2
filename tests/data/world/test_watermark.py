"""The watermark of clips: where it is, and how much of it frames show."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.world.clips import draw_clip
from trainer.data.world.scenes import SCENE_SIDE
from trainer.data.world.watermark import ROWS, STRENGTH, mark_in, marked, pattern


def test_the_watermark_is_as_light_as_dark_in_every_row() -> None:
    stripes = pattern()
    assert not stripes.sum(1).any() and set(np.unique(stripes)) == {-1, 0, 1}
    assert (stripes[ROWS, :8] == 1).all() and (stripes[ROWS, 8:16] == -1).all()
    gray = np.full((2, SCENE_SIDE, SCENE_SIDE, 3), 128, np.uint8)
    moved = marked(gray)[0, :, :, 1].astype(float) - 128
    assert np.abs(moved - 255 * STRENGTH * stripes).max() <= 1
    assert not moved[: ROWS.start].any() and moved[ROWS].all()
    assert marked(np.full_like(gray, 255)).max() == 255  # clipped, not wrapped round


def test_how_much_of_the_watermark_frames_show() -> None:
    gray = np.full((1, SCENE_SIDE, SCENE_SIDE, 3), 0.5)
    lit = gray + 0.5 * STRENGTH * pattern()[..., None]
    assert mark_in(lit) == pytest.approx([0.5])
    frames = np.stack([draw_clip(3, i).frames for i in range(60)])
    assert mark_in(marked(frames) / 255).mean() > 0.8  # the lightest and darkest clip it
    assert abs(mark_in(frames / 255).mean()) < 0.02
