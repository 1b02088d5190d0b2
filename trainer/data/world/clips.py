"""Clips of the embedded world: sprites that move, rotate, grow and pass each other. Their boxes and
masks are known exactly.

A clip is a pure function of `(seed, index, names, frames, fps, motion)`. Its motion is a function
of time and takes one second; frame i shows the time i / fps. So 16 frames at 16 a second show the
same motion as 8 frames at 8 a second, at twice as many moments.

    a fox moving left slowly            11 to 14 pixels a second; 25 to 31 without a word for the
                                        speed, 37 to 42 quickly
    a fox rotating, a fox spinning      clockwise, a third of a turn and a full turn a second
    a fox growing, a fox shrinking      to or from 1.8 times the size; slowly 1.4, quickly 2.4 times
    a fox passing behind an apple       crosses the whole frame, in any of four directions
    a fox moving up and a cow standing still    side by side, never crossing each other

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
# a second, by the word for the speed, "" for none
PIXELS: dict[str, tuple[float, float]] = {"": (25, 31), "slowly": (11, 14), "quickly": (37, 42)}
DEGREES: dict[str, float] = {"": 1.0, "slowly": 0.6, "quickly": 1.5}  # factor on `TURNS`
TURNS: dict[str, tuple[float, float]] = {"rotating": (110, 130), "spinning": (340, 380)}
GROWTH: dict[str, tuple[float, float]] = {"": (1.7, 1.9), "slowly": (1.35, 1.45),
                                          "quickly": (2.3, 2.5)}  # fmt: skip
STILL = "standing still"


@dataclass(frozen=True)
class Track:
    """One sprite through time.

    motion, speed: words of the caption. x, y: its centre at 0 s; velocity (dx, dy) in pixels a
    second; size: its longer side at 0 s; growth: the factor on its size after a second; turn:
    degrees clockwise a second.
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

    def at(self, seconds: float, detail: int = 1) -> Spot:
        """Where the sprite is at a time; detail: as of `render_clip`."""
        dx, dy = self.velocity
        size = round(detail * self.size * self.growth**seconds)
        x, y = detail * (self.x + dx * seconds), detail * (self.y + dy * seconds)
        return Spot(self.word, x=x, y=y, size=size, angle=round(self.turn * seconds))

    @property
    def phrase(self) -> str:
        """The words of the caption, as in "a fox moving left slowly"."""
        return " ".join(filter(None, (article(self.word), self.motion, self.speed)))


@dataclass(frozen=True)
class Plot:
    """A clip before it is drawn: tracks from back to front. crossing: how the first object in the
    caption passes the second, or None."""

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
    *,
    frames: int = 8,
    fps: float | None = None,
    motion: str | None = None,
    begin: float = 0.0,
    detail: int = 1,
) -> Clip:
    """Clip number `index` of the world `seed`; arguments and errors as for `draw_plot` and
    `render_clip`."""
    story = draw_plot(seed, index, names, motion=motion)
    return render_clip(story, frames, fps, begin=begin, detail=detail)


def render_clip(
    story: Plot,
    frames: int = 8,
    fps: float | None = None,
    *,
    begin: float = 0.0,
    detail: int = 1,
) -> Clip:
    """The frames of a plot at times begin, begin + 1/fps, ...; fps None spreads them over the
    second. detail: pixels along an edge for each of the world's, which has `SCENE_SIDE`.

    Raises:
        ValueError: no frame, or the frames take more than a second.
    """
    fps = check_rate(frames, fps)
    canvas = background(story.background, SCENE_SIDE * detail)
    drawn = [
        compose([track.at(begin + i / fps, detail) for track in story.tracks], canvas.copy())
        for i in range(frames)
    ]
    images, objects = zip(*drawn, strict=True)
    return Clip(frames=np.stack(images), objects=objects, fps=fps, plot=story)


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
    seed: int, index: int, names: Sequence[str] = KNOWN, *, motion: str | None = None
) -> Plot:
    """The objects of clip `index` of the world `seed`, their motion, and the caption.

    Args:
        names: the words to choose objects from.
        motion: one of `MOTIONS`, for a clip of one object with this motion; None chooses one object
            (65 %), two that cross (20 %) or two beside each other (15 %).

    Raises:
        ValueError: no such motion, or fewer than two names for a clip of two objects.
    """
    if motion is not None and motion not in MOTIONS:
        raise ValueError(f"motion={motion!r}: choose one of {', '.join(MOTIONS)}")
    rng = np.random.default_rng((seed, index, 2))  # other random numbers than scene `index`
    kind = "one" if motion else ("one", "cross", "pair")[rng.choice(3, p=[0.65, 0.2, 0.15])]
    number = 1 if kind == "one" else 2
    if number > len(names):
        raise ValueError(
            f"a clip of {number} objects needs as many names, and {len(names)} are given"
        )
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
    return Plot(tracks=tuple(tracks), caption=text, background=backdrop, crossing=crossing)


def _pick_motion(rng: np.random.Generator) -> str:
    """One of the four directions in 60 %, else one of the other motions."""
    others = [motion for motion in MOTIONS if motion not in DIRECTIONS]
    choice = list(DIRECTIONS) if rng.random() < 0.6 else others
    return choice[rng.integers(len(choice))]


def _pick_speed(rng: np.random.Generator) -> str:
    return ("", *SPEEDS)[rng.choice(3, p=[0.5, 0.25, 0.25])]


def _one(rng: np.random.Generator, word: str, motion: str) -> Track:
    if motion in DIRECTIONS:
        return _moving(rng, word, motion=motion, lane=(0, SCENE_SIDE), largest=40)
    if motion == STILL:
        return _placed(rng, _track(word, motion, size=int(rng.integers(20, 41))), 1.0)
    speed = _pick_speed(rng)
    if motion in TURNS:
        turn = rng.uniform(*TURNS[motion]) * DEGREES[speed]
        track = _track(word, motion, speed=speed, size=int(rng.integers(24, 41)), turn=turn)
        return _placed(rng, track, 2**0.5)
    factor, largest = rng.uniform(*GROWTH[speed]), int(rng.integers(38, 53))
    if motion == "growing":
        track = _track(word, motion, speed=speed, size=largest / factor, growth=factor)
        return _placed(rng, track, factor)
    track = _track(word, motion, speed=speed, size=largest, growth=1 / factor)
    return _placed(rng, track, 1.0)


def _track(
    word: str, motion: str, *, size: float, speed: str = "", growth: float = 1.0, turn: float = 0.0
) -> Track:
    """A track at (0, 0) that stays there."""
    return Track(
        word=word, motion=motion, speed=speed, x=0, y=0, size=size, growth=growth, turn=turn
    )


def _placed(rng: np.random.Generator, track: Track, reach: float) -> Track:
    """The track at a random position where a sprite of `reach` times its size fits in the frame."""
    half = track.size * reach / 2
    x, y = rng.uniform(half, SCENE_SIDE - half, 2)
    return replace(track, x=x, y=y)


def _moving(
    rng: np.random.Generator, word: str, *, motion: str, lane: tuple[float, float], largest: int
) -> Track:
    """A straight motion that stays in the frame for the second. Perpendicular to the motion, the
    sprite stays in the lane (low, high)."""
    speed = _pick_speed(rng)
    travel = rng.uniform(*PIXELS[speed])
    size = int(rng.integers(20, min(largest, int(SCENE_SIDE - travel)) + 1))
    along = rng.uniform(size / 2, SCENE_SIDE - size / 2 - travel)
    across = rng.uniform(lane[0] + size / 2, lane[1] - size / 2)
    return _straight(
        _track(word, motion, speed=speed, size=size), along=along, across=across, travel=travel
    )


def _straight(track: Track, *, along: float, across: float, travel: float) -> Track:
    """The track moving `travel` pixels in a second. It starts `along` pixels from the side it comes
    from; `across` is its other coordinate."""
    dx, dy = DIRECTIONS[track.motion]
    start = along if dx + dy > 0 else SCENE_SIDE - along
    x, y = (start, across) if dx else (across, start)
    return replace(track, x=x, y=y, velocity=(dx * travel, dy * travel))


def _cross(rng: np.random.Generator, words: Sequence[str], in_front: bool) -> list[Track]:
    """The first object crosses the frame, and passes the second, which stands still, in the middle
    of the clip. Returns the tracks from back to front."""
    motion = list(DIRECTIONS)[rng.integers(4)]
    size, other = int(rng.integers(18, 23)), int(rng.integers(22, 29))
    travel = SCENE_SIDE - size
    across = rng.uniform(other / 2, SCENE_SIDE - other / 2)
    mover = _straight(
        _track(words[0], motion, size=size), along=size / 2, across=across, travel=travel
    )
    shift = rng.uniform(-5, 5)
    middle = mover.at(0.45 * SECONDS)
    dx, dy = DIRECTIONS[motion]
    x, y = middle.x + shift * abs(dy), middle.y + shift * abs(dx)
    low, high = other / 2, SCENE_SIDE - other / 2
    x, y = float(np.clip(x, low, high)), float(np.clip(y, low, high))
    stander = replace(_track(words[1], STILL, size=other), x=x, y=y)
    return [stander, mover] if in_front else [mover, stander]


def _pair(rng: np.random.Generator, words: Sequence[str]) -> list[Track]:
    """Two objects, each in its half of the frame: the first moves, the second moves parallel to it
    or stands still."""
    motion = list(DIRECTIONS)[rng.integers(4)]
    lanes = [(0.0, SCENE_SIDE / 2), (SCENE_SIDE / 2, float(SCENE_SIDE))]
    if rng.random() < 0.5:
        lanes.reverse()
    first = _moving(rng, words[0], motion=motion, lane=lanes[0], largest=28)
    if rng.random() < 1 / 3:
        size = int(rng.integers(20, 29))
        along = rng.uniform(size / 2, SCENE_SIDE - size / 2)
        across = rng.uniform(lanes[1][0] + size / 2, lanes[1][1] - size / 2)
        x, y = (along, across) if DIRECTIONS[motion][0] else (across, along)
        return [first, replace(_track(words[1], STILL, size=size), x=x, y=y)]
    other = motion if rng.random() < 0.4 else OPPOSITE[motion]
    return [first, _moving(rng, words[1], motion=other, lane=lanes[1], largest=28)]
