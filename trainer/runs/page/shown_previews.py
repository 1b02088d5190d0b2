"""The previews of a run as small pictures inside a page."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence

from trainer.media.images import DAMAGED_IMAGE, ImageError
from trainer.media.made_by import facts_in
from trainer.runs.page.charts import spread

SIDE, CLIP_SIDE = 256, 128  # pixels of the longer side, at most
SMALL = 96  # up to so many nothing is lost
QUALITY = 80
FRAMES = 16  # of a clip
PROMPTS = 8
BYTES = 1_700_000  # of all pictures of a page, as text
STEP = re.compile(r"step-(\d{6,})")
NUMBERED = re.compile(r"(\d{2,})-.*?(\.maps)?\.(?:png|gif)")


@dataclass(frozen=True)
class Previewed:
    """One prompt. pictures, maps: `data:` addresses by step; the maps show where each word of the
    prompt is attended to, in the order of `words`."""

    prompt: str
    pictures: Mapping[int, str]
    maps: Mapping[int, str]
    words: str = ""


@dataclass(frozen=True)
class Previews:
    """All that a page shows. note: what is left out."""

    prompts: Sequence[Previewed] = ()
    note: str = ""

    @property
    def steps(self) -> list[int]:
        """Those with an adapter, in their order."""
        return sorted({step for each in self.prompts for step in each.pictures if step})


def previews_of(folder: Path) -> Previews:
    """The previews of a run folder, of as many steps as fit into `BYTES`."""
    places = _places(folder / "previews")
    count = len(places)
    while True:
        made = Previews(list(_prompts(places)))
        if _size(made) <= BYTES or len(places) <= 2:
            break
        places = dict(spread(list(places.items()), max(2, len(places) // 2)))
    said = []
    if len(places) < count:
        said.append(f"{len(places)} of {count} steps are shown, so that the page stays small")
    if (all_prompts := _most(places)) > PROMPTS:
        said.append(f"{PROMPTS} of {all_prompts} prompts are shown")
    return Previews(made.prompts, "; ".join(said))


def _places(folder: Path) -> dict[int, Path]:
    """The folders of previews by their steps."""
    found = ((STEP.fullmatch(path.name), path) for path in sorted(folder.glob("step-*/")))
    return {int(match[1]): path for match, path in found if match}


def _files(place: Path, maps: bool) -> dict[int, Path]:
    """By the number of the prompt."""
    found = ((NUMBERED.fullmatch(path.name), path) for path in sorted(place.iterdir()))
    return {int(match[1]): path for match, path in found if match and bool(match[2]) == maps}


def _most(places: Mapping[int, Path]) -> int:
    return max((len(_files(place, False)) for place in places.values()), default=0)


def _prompts(places: Mapping[int, Path]) -> Iterator[Previewed]:
    pictures = {step: _files(place, False) for step, place in places.items()}
    maps = {step: _files(place, True) for step, place in places.items()}
    numbers = sorted({number for files in pictures.values() for number in files})
    for number in numbers[:PROMPTS]:
        own = {step: files[number] for step, files in pictures.items() if number in files}
        drawn = {step: files[number] for step, files in maps.items() if number in files}
        shown = {step: small for step, path in own.items() if (small := _small(path))}
        heat = {step: small for step, path in drawn.items() if (small := _small(path))}
        if shown:
            last = own[max(shown)]
            words = _words(drawn[max(heat)]) if heat else ""
            yield Previewed(_prompt(last), shown, heat, words=words)


def _prompt(path: Path) -> str:
    with suppress(ImageError, OSError):
        return str(facts_in(path)["prompt"])
    return path.stem.partition("-")[2].replace("-", " ")


def _words(path: Path) -> str:
    """The words whose maps a sheet shows."""
    with suppress(*DAMAGED_IMAGE), Image.open(path, formats=("PNG",)) as sheet:
        return str(sheet.info.get("words", ""))
    return ""


def _small(path: Path) -> str | None:
    """A picture or clip as a `data:` address; None where it cannot be read."""
    with suppress(OSError):
        facts = path.stat()
        return _encoded(path, facts.st_mtime_ns, facts.st_size)
    return None


@lru_cache(maxsize=2048)  # a page is written again and again while a run trains
def _encoded(path: Path, changed: int, size: int) -> str | None:
    buffer = BytesIO()
    try:
        with Image.open(path, formats=("PNG", "GIF")) as image:
            if getattr(image, "n_frames", 1) > 1:
                _save_clip(image, buffer)
            else:
                sheet = path.name.endswith(".maps.png")
                own = image.convert("RGB")
                if not sheet:  # a sheet of maps is made small already, and has text in it
                    own.thumbnail((SIDE, SIDE))
                exact = max(own.size) <= SMALL
                own.save(buffer, "WEBP", lossless=exact, quality=QUALITY, method=2)
    except (*DAMAGED_IMAGE, Image.DecompressionBombError):
        return None
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _save_clip(clip: Any, buffer: BytesIO) -> None:
    """As an animation of up to `FRAMES` frames, which takes as long as the clip."""
    took = float(clip.info.get("duration", 100))
    frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(clip)]
    chosen = spread(frames, FRAMES)
    for frame in chosen:
        frame.thumbnail((CLIP_SIDE, CLIP_SIDE))
    each = max(20, round(took * len(frames) / len(chosen)))
    chosen[0].save(
        buffer, "WEBP", save_all=True, append_images=chosen[1:], duration=each, loop=0,
        quality=QUALITY,
    )  # fmt: skip


def _size(made: Previews) -> int:
    return sum(
        len(text)
        for each in made.prompts
        for text in (*each.pictures.values(), *each.maps.values())
    )
