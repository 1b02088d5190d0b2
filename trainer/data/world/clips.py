"""Clips of the embedded world: sprites that move, turn, grow and pass each other, known exactly.

A clip is a pure function of `(seed, index, names)`. Its motion is a function of time and takes one
second; frame i of n shows the time i / fps. So 16 frames at 16 a second are the same motion as 8
frames at 8, seen at twice as many moments.

    a fox moving left slowly            11 to 14 pixels a second; 25 to 31 without a word for the
                                        speed, 37 to 42 quickly
    a fox rotating, a fox spinning      clockwise, a third of a turn and a whole turn a second
    a fox growing, a fox shrinking      to the 1.8-fold size and from it; slowly 1.4, quickly 2.4
    a fox passing behind an apple       crosses the whole frame, in any of four directions
    a fox moving up and a cow standing still    side by side, and never across each other

The words are those that the captions of stills know (`MOTIONS`, `SPEEDS`, `CROSSINGS`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainer.data.world.scenes import (
    CROSSINGS,
    MOTIONS,
    OPENINGS,
    SCENE_SIDE,
    SPEEDS,
    Placed,
    Spot,
    article,
    background,
    compose,
    pick_background,
)
from trainer.data.world.sprites import KNOWN

SECONDS = 1.0
# (dx, dy) of one step
DIRECTIONS: dict[str, tuple[int, int]] = {
    "moving up": (0, -1), "moving down": (0, 1), "moving left": (-1, 0), "moving right": (1, 0),
}  # fmt: skip
OPPOSITE = {
    "moving up": "moving down", "moving down": "moving up", "moving left": "moving right",
    "moving right": "moving left",
}  # fmt: skip
# by the word for the speed, "" where there is none
PIXELS: dict[str, tuple[float, float]] = {"": (25, 31), "slowly": (11, 14), "quickly": (37, 42)}
DEGREES: dict[str, float] = {"": 1.0, "slowly": 0.6, "quickly": 1.5}  # of those below
TURNS: dict[str, tuple[float, float]] = {"rotating": (110, 130), "spinning": (340, 380)}
GROWTH: dict[str, tuple[float, float]] = {"": (1.7, 1.9), "slowly": (1.35, 1.45),
                                          "quickly": (2.3, 2.5)}  # fmt: skip
STILL = "standing still"


@dataclass(frozen=True)
class Track:
    """One sprite through time.

    motion, speed: the words that say it. x, y: its centre at 0 s; velocity (dx, dy) in pixels a
    second; size: its longer side at 0 s; growth: what a second multiplies it by; turn: degrees
    clockwise a second.
    """

    word: str
    motion: str
    speed: str
    x: float
    y: float
    size: float
    velocity: tuple[float, float] = (0.0, 0.0)
    growth: float = 1.0
    turn: float = 0.0

    def at(self, seconds: float) -> Spot:
        dx, dy = self.velocity
        size = round(self.size * self.growth**seconds)
        x, y = self.x + dx * seconds, self.y + dy * seconds
        return Spot(self.word, x, y, size, round(self.turn * seconds))

    @property
    def phrase(self) -> str:
        return " ".join(filter(None, (article(self.word), self.motion, self.speed)))


@dataclass(frozen=True)
class Plot:
    """A clip before it is painted: tracks from back to front. crossing: how the first object that
    the caption names passes the second, if it does."""

    tracks: tuple[Track, ...]
    caption: str
    background: str
    crossing: str | None = None


@dataclass(frozen=True)
class Clip:
    """frames (n, side, side, 3) uint8; objects: for every frame what is visible of each track,
    from back to front, in the order of `plot.tracks`."""

    frames: np.ndarray
    objects: tuple[tuple[Placed, ...], ...]
    fps: float
    plot: Plot

    @property
    def caption(self) -> str:
        return self.plot.caption


def draw_clip(
    seed: int,
    index: int,
    names: Sequence[str] = KNOWN,
    frames: int = 8,
    fps: float | None = None,
    motion: str | None = None,
) -> Clip:
    """Clip number `index` of the world `seed`, painted; see `plot`, and `paint` for the errors."""
    return render_clip(draw_plot(seed, index, names, motion), frames, fps)


def render_clip(story: Plot, frames: int = 8, fps: float | None = None) -> Clip:
    """The frames of a plot at times 0, 1/fps, ...; fps None spreads them over the whole second.

    Raises:
        ValueError: no frame, or more than the second holds.
    """
    fps = check_rate(frames, fps)
    canvas = background(story.background)
    painted = [
        compose([track.at(i / fps) for track in story.tracks], canvas.copy()) for i in range(frames)
    ]
    images, objects = zip(*painted, strict=True)
    return Clip(np.stack(images), objects, fps, story)


def check_rate(frames: int, fps: float | None) -> float:
    """Frames a second. Raises ValueError if the clip has no frame, or lasts over a second."""
    rate = frames / SECONDS if fps is None else fps
    if frames < 1 or rate <= 0 or frames / rate > SECONDS + 1e-9:
        raise ValueError(
            f"frames={frames} at fps={rate:g}: a clip of the world lasts one second; give at least "
            "one frame, and as many frames a second as frames"
        )
    return rate


def draw_plot(
    seed: int, index: int, names: Sequence[str] = KNOWN, motion: str | None = None
) -> Plot:
    """What moves how in clip `index` of the world `seed`, and its caption.

    Args:
        names: the words objects are drawn from.
        motion: one of `MOTIONS`, for a clip of one object that does this; None draws one object
            (65 %), two that cross (20 %) or two beside each other (15 %).

    Raises:
        ValueError: no such motion, or fewer than two names to draw two objects from.
    """
    if motion is not None and motion not in MOTIONS:
        raise ValueError(f"motion={motion!r}: choose one of {', '.join(MOTIONS)}")
    rng = np.random.default_rng((seed, index, 2))  # not the numbers that scene `index` is drawn by
    kind = "one" if motion else ("one", "cross", "pair")[rng.choice(3, p=[0.65, 0.2, 0.15])]
    number = 1 if kind == "one" else 2
    if number > len(names):
        raise ValueError(f"{number} objects to draw, {len(names)} names given")
    words = [names[i] for i in rng.choice(len(names), number, replace=False)]
    backdrop = pick_background(rng)
    crossing = None
    if kind == "one":
        tracks = [_one(rng, words[0], motion or _pick_motion(rng))]
        text = tracks[0].phrase
    elif kind == "cross":
        crossing = CROSSINGS[rng.integers(2)]
        tracks = _cross(rng, words, in_front=crossing == CROSSINGS[0])
        text = f"{article(words[0])} {crossing} {article(words[1])}"
    else:
        tracks = _pair(rng, words)
        text = " and ".join(track.phrase for track in tracks)
    text = OPENINGS[rng.choice(3, p=[0.7, 0.15, 0.15])] + text
    if rng.random() < 0.85:
        text += f" on {article(backdrop)} background"
    return Plot(tuple(tracks), text, backdrop, crossing)


def _pick_motion(rng: np.random.Generator) -> str:
    """One of the four directions in 60 %, the others alike."""
    others = [motion for motion in MOTIONS if motion not in DIRECTIONS]
    choice = list(DIRECTIONS) if rng.random() < 0.6 else others
    return choice[rng.integers(len(choice))]


def _pick_speed(rng: np.random.Generator) -> str:
    return ("", *SPEEDS)[rng.choice(3, p=[0.5, 0.25, 0.25])]


def _one(rng: np.random.Generator, word: str, motion: str) -> Track:
    if motion in DIRECTIONS:
        return _moving(rng, word, motion, (0, SCENE_SIDE), 40)
    if motion == STILL:
        return _placed(rng, Track(word, motion, "", 0, 0, int(rng.integers(20, 41))), 1.0)
    speed = _pick_speed(rng)
    if motion in TURNS:
        turn = rng.uniform(*TURNS[motion]) * DEGREES[speed]
        track = Track(word, motion, speed, 0, 0, int(rng.integers(24, 41)), turn=turn)
        return _placed(rng, track, 2**0.5)
    factor, largest = rng.uniform(*GROWTH[speed]), int(rng.integers(38, 53))
    if motion == "growing":
        track = Track(word, motion, speed, 0, 0, largest / factor, growth=factor)
        return _placed(rng, track, factor)
    track = Track(word, motion, speed, 0, 0, largest, growth=1 / factor)
    return _placed(rng, track, 1.0)


def _placed(rng: np.random.Generator, track: Track, reach: float) -> Track:
    """Somewhere in the frame, where `reach` times its size has room."""
    half = track.size * reach / 2
    x, y = rng.uniform(half, SCENE_SIDE - half, 2)
    return replace(track, x=x, y=y)


def _moving(
    rng: np.random.Generator, word: str, motion: str, lane: tuple[float, float], largest: int
) -> Track:
    """Along a straight line that is inside the frame for the whole second, and across it inside
    the lane (low, high)."""
    speed = _pick_speed(rng)
    travel = rng.uniform(*PIXELS[speed])
    size = int(rng.integers(20, min(largest, int(SCENE_SIDE - travel)) + 1))
    along = rng.uniform(size / 2, SCENE_SIDE - size / 2 - travel)
    across = rng.uniform(lane[0] + size / 2, lane[1] - size / 2)
    return _straight(word, motion, speed, size, along, across, travel)


def _straight(
    word: str, motion: str, speed: str, size: int, along: float, across: float, travel: float
) -> Track:
    """From `along`, measured from the side it comes from, by `travel` pixels in a second."""
    dx, dy = DIRECTIONS[motion]
    start = along if dx + dy > 0 else SCENE_SIDE - along
    x, y = (start, across) if dx else (across, start)
    return Track(word, motion, speed, x, y, size, (dx * travel, dy * travel))


def _cross(rng: np.random.Generator, words: Sequence[str], in_front: bool) -> list[Track]:
    """The first object goes from one side to the other and is past the second, which stands still,
    in the middle of the clip. From back to front."""
    motion = list(DIRECTIONS)[rng.integers(4)]
    size, other = int(rng.integers(18, 23)), int(rng.integers(22, 29))
    travel = SCENE_SIDE - size
    across = rng.uniform(other / 2, SCENE_SIDE - other / 2)
    mover = _straight(words[0], motion, "", size, size / 2, across, travel)
    shift = rng.uniform(-5, 5)
    middle = mover.at(0.45 * SECONDS)
    dx, dy = DIRECTIONS[motion]
    x, y = middle.x + shift * abs(dy), middle.y + shift * abs(dx)
    low, high = other / 2, SCENE_SIDE - other / 2
    x, y = float(np.clip(x, low, high)), float(np.clip(y, low, high))
    stander = Track(words[1], STILL, "", x, y, other)
    return [stander, mover] if in_front else [mover, stander]


def _pair(rng: np.random.Generator, words: Sequence[str]) -> list[Track]:
    """Two objects, each in its half of the frame: the first moves, the second moves along the same
    axis or stands still."""
    motion = list(DIRECTIONS)[rng.integers(4)]
    lanes = [(0.0, SCENE_SIDE / 2), (SCENE_SIDE / 2, float(SCENE_SIDE))]
    if rng.random() < 0.5:
        lanes.reverse()
    first = _moving(rng, words[0], motion, lanes[0], 28)
    if rng.random() < 1 / 3:
        size = int(rng.integers(20, 29))
        along = rng.uniform(size / 2, SCENE_SIDE - size / 2)
        across = rng.uniform(lanes[1][0] + size / 2, lanes[1][1] - size / 2)
        x, y = (along, across) if DIRECTIONS[motion][0] else (across, along)
        return [first, Track(words[1], STILL, "", x, y, size)]
    other = motion if rng.random() < 0.4 else OPPOSITE[motion]
    return [first, _moving(rng, words[1], other, lanes[1], 28)]
