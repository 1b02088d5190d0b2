"""The embedded world: captioned scenes of sprites whose boxes, masks, order and relations are known
exactly.

A scene is a pure function of `(seed, index, names, count, relation)`. Scenes are drawn when they
are used (about 3,000 a second on one core), or written as shards by `data/tars/write_shards.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.common.articles import article_of
from trainer.data.world.sprites import KNOWN, turned

SCENE_SIDE = 64

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245), "black": (25, 25, 28), "gray": (140, 140, 145), "red": (200, 50, 50),
    "orange": (240, 150, 50), "yellow": (245, 220, 90), "green": (70, 160, 80),
    "blue": (60, 100, 200), "purple": (130, 80, 170), "pink": (245, 170, 195),
    "brown": (120, 85, 60),
}  # fmt: skip

# (dx, dy) from the first object to the second
RELATIONS: dict[str, tuple[int, int]] = {
    "left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1),
}  # fmt: skip
POSITIONS: dict[str, tuple[float, float]] = {
    "on the left": (0.22, 0.5), "on the right": (0.78, 0.5), "at the top": (0.5, 0.22),
    "at the bottom": (0.5, 0.78), "in the middle": (0.5, 0.5),
    "in the top left corner": (0.22, 0.22), "in the top right corner": (0.78, 0.22),
    "in the bottom left corner": (0.22, 0.78), "in the bottom right corner": (0.78, 0.78),
}  # fmt: skip
# words of clips; in the caption of a still they have no visible meaning, but the image model must
# know them before it becomes a video model
MOTIONS: tuple[str, ...] = (
    "moving up", "moving down", "moving left", "moving right", "rotating", "spinning", "growing",
    "shrinking", "standing still",
)  # fmt: skip
SPEEDS: tuple[str, ...] = ("slowly", "quickly")
CROSSINGS: tuple[str, ...] = ("passing in front of", "passing behind")
OPENINGS: tuple[str, ...] = ("", "a photo of ", "a picture of ")


@dataclass(frozen=True)
class Placed:
    """One sprite in a scene: its word, box (x0, y0, x1, y1) in pixels, and visible mask (side,
    side) bool."""

    word: str
    box: tuple[int, int, int, int]
    mask: np.ndarray

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """image (side, side, 3) uint8; objects from back to front; relation between the first two, if
    the caption states it."""

    image: np.ndarray
    caption: str
    objects: tuple[Placed, ...]
    background: str
    relation: str | None = None


@dataclass(frozen=True)
class Spot:
    """Where a sprite is drawn: its centre and longer side in pixels, and its clockwise rotation in
    degrees."""

    word: str
    x: float
    y: float
    size: int
    angle: int = 0


def article(words: str) -> str:
    """`words` with "a" or "an" before them."""
    return f"{article_of(words)} {words}"


def background(name: str, side: int = SCENE_SIDE) -> np.ndarray:
    """`"blue"` or `"blue to green gradient"` as float32 (side, side, 3) in [0, 1]; gradients run
    from top to bottom."""
    ends = name.removesuffix(" gradient").split(" to ")
    try:
        top, bottom = (np.array(COLOURS[end], np.float32) / 255 for end in (ends[0], ends[-1]))
    except KeyError as unknown:
        raise ValueError(
            f"unknown background colour {unknown}; choose from {', '.join(COLOURS)}"
        ) from None
    t = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
    return np.broadcast_to(top * (1 - t) + bottom * t, (side, side, 3)).copy()


def compose(spots: Sequence[Spot], canvas: np.ndarray) -> tuple[np.ndarray, tuple[Placed, ...]]:
    """Draws the spots onto a float canvas (side, side, 3) in [0, 1], back to front; returns uint8
    pixels, and the box and visible mask of each spot."""
    side = canvas.shape[0]
    owner = np.full((side, side), -1, np.int16)
    boxes = []
    for number, spot in enumerate(spots):
        pixels = turned(spot.word, spot.size, spot.angle)
        height, width = pixels.shape[:2]
        x0, y0 = round(spot.x - width / 2), round(spot.y - height / 2)
        left, top, right, bottom = (
            max(x0, 0),
            max(y0, 0),
            min(x0 + width, side),
            min(y0 + height, side),
        )
        boxes.append((left, top, max(right, left), max(bottom, top)))
        if right <= left or bottom <= top:
            continue
        patch = pixels[top - y0 : bottom - y0, left - x0 : right - x0]
        alpha = patch[..., 3:]
        canvas[top:bottom, left:right] = (
            canvas[top:bottom, left:right] * (1 - alpha) + patch[..., :3]
        )
        owner[top:bottom, left:right][alpha[..., 0] > 0.5] = number
    placed = tuple(
        Placed(spot.word, box, owner == number)
        for number, (spot, box) in enumerate(zip(spots, boxes, strict=True))
    )
    return (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8), placed


def nearness(objects: Sequence[Placed]) -> np.ndarray:
    """How near what each pixel shows is, (side, side) float32: 0 the background, 1 the object in
    front, those behind it evenly between. objects: from back to front."""
    near = np.zeros(objects[0].mask.shape, np.float32)
    for number, placed in enumerate(objects, 1):
        near[placed.mask] = number / len(objects)
    return near


@dataclass(frozen=True)
class Layout:
    """A scene before it is drawn: spots from back to front, and what its caption says."""

    spots: tuple[Spot, ...]
    caption: str
    background: str
    relation: str | None


def draw_scene(
    seed: int,
    index: int,
    names: Sequence[str] = KNOWN,
    *,
    count: int | None = None,
    relation: str | None = None,
) -> Scene:
    """The scene number `index` of the world `seed`; arguments and errors as for `draw_layout`."""
    plan = draw_layout(seed, index, names, count=count, relation=relation)
    image, placed = compose(plan.spots, background(plan.background))
    return Scene(
        image=image,
        caption=plan.caption,
        objects=placed,
        background=plan.background,
        relation=plan.relation,
    )


def draw_layout(
    seed: int,
    index: int,
    names: Sequence[str] = KNOWN,
    *,
    count: int | None = None,
    relation: str | None = None,
) -> Layout:
    """The objects of scene `index` of the world `seed`, where they are, and the caption.

    Args:
        names: the words to choose objects from.
        count: 1, 2 or 3 objects; None chooses at random (45 %, 45 %, 10 %).
        relation: one of `RELATIONS` to state between two objects; None chooses at random whether
            one is stated, and which.

    Raises:
        ValueError: a count outside 1..3, or more objects than names.
    """
    rng = np.random.default_rng((seed, index))
    number = int(rng.choice([1, 2, 3], p=[0.45, 0.45, 0.1])) if count is None else count
    if not 1 <= number <= 3:
        raise ValueError(f"count is {number}; a scene has 1, 2 or 3 objects")
    if number > len(names):
        raise ValueError(
            f"a scene of {number} objects needs as many names, and {len(names)} are given"
        )
    words = [names[i] for i in rng.choice(len(names), number, replace=False)]
    backdrop = pick_background(rng)
    spots, text, relation = _draw_spots(rng, words, relation)
    text = OPENINGS[rng.choice(3, p=[0.7, 0.15, 0.15])] + text
    if rng.random() < 0.85:
        text += f" on {article(backdrop)} background"
    order = rng.permutation(number) if number > 1 else range(number)
    ordered = tuple(spots[i] for i in order)
    return Layout(ordered, caption=text, background=backdrop, relation=relation)


def _draw_spots(
    rng: np.random.Generator, words: list[str], relation: str | None
) -> tuple[list[Spot], str, str | None]:
    """The spots of one, two or three objects, the text about them, and the stated relation."""
    if len(words) == 2:
        return _two(rng, words, relation=relation, side=SCENE_SIDE)
    if len(words) == 3:
        return *_three(rng, words, SCENE_SIDE), None
    return *_one(rng, words[0], SCENE_SIDE), None


def pick_background(rng: np.random.Generator) -> str:
    """A random colour (75 %) or a gradient between two."""
    names = list(COLOURS)
    first, second = rng.choice(len(names), 2, replace=False)
    return names[first] if rng.random() < 0.75 else f"{names[first]} to {names[second]} gradient"


def _one(rng: np.random.Generator, word: str, side: int) -> tuple[list[Spot], str]:
    size = int(rng.integers(20, 49))
    text = article(word)
    if size < 28 and rng.random() < 0.5:
        text = f"a small {word}"
    elif size > 39 and rng.random() < 0.5:
        text = f"a big {word}"
    if rng.random() < 0.1:
        text += " " + MOTIONS[rng.integers(len(MOTIONS))]
        text += " " + SPEEDS[rng.integers(2)] if rng.random() < 0.4 and "still" not in text else ""
    if size <= 30 and rng.random() < 0.5:
        place = list(POSITIONS)[rng.integers(len(POSITIONS))]
        x, y = (np.array(POSITIONS[place]) + rng.uniform(-0.07, 0.07, 2)) * side
        return [_spot(word, x, y, size=size, side=side)], f"{text} {place}"
    x, y = rng.uniform(size / 2, side - size / 2, 2)
    return [Spot(word, x=x, y=y, size=size)], text


def _two(
    rng: np.random.Generator, words: list[str], *, relation: str | None, side: int
) -> tuple[list[Spot], str, str | None]:
    stated = relation or list(RELATIONS)[rng.integers(len(RELATIONS))]
    dx, dy = RELATIONS[stated]
    sizes = rng.integers(20, 31, 2)
    gap = rng.uniform(0.5 * sizes.sum() * 0.95, side - 0.5 * sizes.sum())
    # each is a little off their common line; the stated axis remains the main one
    across = rng.uniform(-0.12, 0.12, 2) * side
    middle = np.array([side / 2, side / 2])
    slack = max(0.0, (side - gap - 0.5 * sizes.sum()) / 2)
    shift = rng.uniform(-slack, slack) + (sizes[0] - sizes[1]) / 4 * (dx + dy)
    along = np.array([dx, dy], float)
    ortho = np.array([abs(dy), abs(dx)], float)
    lift = rng.uniform(-0.15, 0.15) * side
    first = middle - along * gap / 2 + np.abs(along) * shift + ortho * (across[0] + lift)
    second = middle + along * gap / 2 + np.abs(along) * shift + ortho * (across[1] + lift)
    spots = [
        _spot(word, x, y, size=int(size), side=side)
        for word, (x, y), size in zip(words, (first, second), sizes, strict=True)
    ]
    one, two = article(words[0]), article(words[1])
    if relation is not None or rng.random() < 0.75:
        return spots, f"{one} {stated} {two}", stated
    if rng.random() < 0.15:
        return spots, f"{one} {CROSSINGS[rng.integers(2)]} {two}", None
    joint = ("and", "next to", "beside", "with")[rng.integers(4)]
    return spots, f"{one} {joint} {two}", None


def _three(rng: np.random.Generator, words: list[str], side: int) -> tuple[list[Spot], str]:
    sizes = rng.integers(16, 22, 3)
    horizontal = rng.random() < 0.6
    along = (np.array([1 / 6, 3 / 6, 5 / 6]) + rng.uniform(-0.02, 0.02, 3)) * side
    across = (0.5 + rng.uniform(-0.25, 0.25) + rng.uniform(-0.08, 0.08, 3)) * side
    points = zip(along, across, strict=True) if horizontal else zip(across, along, strict=True)
    spots = [
        _spot(word, x, y, size=int(size), side=side)
        for word, (x, y), size in zip(words, points, sizes, strict=True)
    ]
    left, middle, right = (article(word) for word in words)
    if rng.random() < 0.5:
        return spots, f"{middle} between {left} and {right}"
    return spots, f"{left}, {middle} and {right}"


def _spot(word: str, x: float, y: float, *, size: int, side: int) -> Spot:
    """A spot near (x, y), moved so that the sprite is completely inside the picture."""
    low, high = size / 2, side - size / 2
    return Spot(word, x=float(np.clip(x, low, high)), y=float(np.clip(y, low, high)), size=size)
