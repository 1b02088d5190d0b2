"""The scenes and clips of a seed stay what they were: the shipped weights were trained on them, and
every recorded figure was measured with them.

    python tests/data/world/test_recorded.py        # records what the code draws today
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.world.clips import Clip, draw_clip
from trainer.data.world.scenes import COLOURS, MOTIONS, Scene, draw_scene
from trainer.data.world.sprites import ALL

RECORDED = Path(__file__).with_name("recorded.json")
BLOCK = 8  # pixels along the side of the blocks whose mean colour is recorded
TOLERANCE = 1.5  # of 255: another version of an imaging library may round otherwise


def brightness(image: np.ndarray) -> list[list[int]]:
    """The mean of each block (8, 8) of an image (64, 64, 3), of all colours."""
    blocks = image.astype(np.float64).mean(-1).reshape(8, BLOCK, 8, BLOCK).mean((1, 3))
    return [[round(value) for value in row] for row in blocks]


def of_scene(scene: Scene) -> dict[str, Any]:
    boxes = [[each.word, *map(int, each.box)] for each in scene.objects]
    return {"caption": scene.caption, "boxes": boxes, "blocks": brightness(scene.image)}


def of_clip(clip: Clip) -> dict[str, Any]:
    boxes = [[[each.word, *map(int, each.box)] for each in frame] for frame in clip.objects]
    return {
        "caption": clip.caption,
        "boxes": boxes,
        "blocks": [brightness(frame) for frame in clip.frames],
    }


def drawn() -> dict[str, Any]:
    """Enough of each kind to meet every background, kind of scene and motion."""
    clips = [draw_clip(9, number, ALL, frames=3) for number in range(24)]
    clips += [draw_clip(5, 0, ALL, frames=3, motion=motion) for motion in MOTIONS]
    return {
        "colours": {name: list(value) for name, value in COLOURS.items()},
        "scenes": [of_scene(draw_scene(9, number, ALL)) for number in range(40)],
        "clips": [of_clip(clip) for clip in clips],
    }


@pytest.mark.parametrize("kind", ["scenes", "clips"])
def test_a_seed_gives_what_it_always_gave(kind: str) -> None:
    wanted, found = json.loads(RECORDED.read_text())[kind], drawn()[kind]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one["caption"] == other["caption"]
        assert one["boxes"] == other["boxes"]
        assert np.abs(np.subtract(one["blocks"], other["blocks"])).max() <= TOLERANCE


def test_every_colour_of_the_ground_is_recorded() -> None:
    scenes = [draw_scene(9, number, ALL) for number in range(40)]
    grounds = {word for scene in scenes for word in scene.background.split()}
    assert len(grounds & set(COLOURS)) >= len(COLOURS) - 2


def test_the_colours_are_the_recorded_ones() -> None:
    assert json.loads(RECORDED.read_text())["colours"] == drawn()["colours"]


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(drawn()) + "\n", encoding="utf-8")
