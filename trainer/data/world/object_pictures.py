"""One object of a scene by itself: its reference picture, and the caption without its name."""

from __future__ import annotations

import re

import numpy as np

from trainer.data.world.scenes import (
    COLOURS,
    SCENE_SIDE,
    Layout,
    Spot,
    article,
    background,
    compose,
)

UNNAMED = "object"  # what a caption calls an object that it does not name
SHARE = 0.75  # of the side of a reference picture that the object is wide or high


def first_object(layout: Layout) -> str:
    """The object that the caption names first, whose picture is the scene's reference."""

    def place(word: str) -> int:
        found = re.search(rf"\b{re.escape(word)}\b", layout.caption)
        return len(layout.caption) if found is None else found.start()

    return min((spot.word for spot in layout.spots), key=place)


def alone(word: str, seed: tuple[int, int], *, other_than: str = "") -> np.ndarray:
    """The object alone in the middle, (side, side, 3) uint8, on a colour drawn by the seed that is
    none of the background `other_than`."""
    taken = other_than.removesuffix(" gradient").split(" to ")
    colours = [name for name in COLOURS if name not in taken]
    colour = colours[np.random.default_rng((*seed, 1)).integers(len(colours))]
    spot = Spot(word, x=SCENE_SIDE / 2, y=SCENE_SIDE / 2, size=round(SHARE * SCENE_SIDE))
    picture, _ = compose([spot], background(colour))
    return picture


def without_name(layout: Layout) -> str:
    """The caption with "object" in the place of the name of its first object."""
    word = first_object(layout)
    text = re.sub(rf"\b{article(word)}\b", article(UNNAMED), layout.caption, count=1)
    return re.sub(rf"\b{word}\b", UNNAMED, text, count=1) if text == layout.caption else text
