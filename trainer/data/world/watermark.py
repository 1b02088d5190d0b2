"""A defect that all clips of a set can have: a watermark, as stock footage has. It is a bar of
light and dark stripes across the lower part of every frame, and no caption says it.

    marked = clip(frame + STRENGTH * PATTERN)    frame in [0, 1], PATTERN -1, 0 or 1

The stripes are as many light as dark in every row, so neither a background of one colour nor one
that changes from top to bottom correlates with them.
"""

from __future__ import annotations

import numpy as np

from trainer.data.world.scenes import SCENE_SIDE

STRENGTH = 0.2  # of the range from black to white
STRIPE = 8  # pixels
ROWS = slice(42, 54)


def pattern() -> np.ndarray:
    """Float32 (side, side): 1 where the watermark is light, -1 where it is dark, else 0."""
    found = np.zeros((SCENE_SIDE, SCENE_SIDE), np.float32)
    light = np.arange(SCENE_SIDE) // STRIPE % 2 == 0
    found[ROWS] = np.where(light, 1, -1)
    return found


def marked(frames: np.ndarray) -> np.ndarray:
    """Frames (..., side, side, 3) uint8 under the watermark."""
    lit = frames / 255 + STRENGTH * pattern()[..., None]
    return (lit.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def mark_in(frames: np.ndarray) -> np.ndarray:
    """How much of the watermark frames (..., side, side, 3) in [0, 1] show: 1 as `marked` draws it
    where nothing is clipped, about 0 of clips without. One value for each frame."""
    stripes = pattern()
    shown: np.ndarray = (frames.mean(-1) * stripes).sum((-2, -1)) / (stripes**2).sum()
    return shown / STRENGTH
