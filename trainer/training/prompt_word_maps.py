"""Where the words of the previews' prompts are among their tokens, and the sheets that show what
each of them is attended to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainer.attention.sites import Site, select
from trainer.backbones.backbone import Backbone
from trainer.common.paths import slug
from trainer.media.grids import cell_side, grid, overlay_maps
from trainer.media.made_by import png_bytes

SHOWN = 12  # words of a prompt, at most
CELL = 128  # pixels of a map's longer side, at most


@dataclass(frozen=True)
class WordPlaces:
    """places: for each prompt the position of the marked word, then those of its own words; as many
    for each prompt. known: whether the prompt has such a word; its position is 0 where not. words:
    the own words of each prompt."""

    places: list[list[int]]
    known: list[list[bool]]
    words: list[list[str]]


def word_places(
    backbone: Backbone, prompts: Sequence[str], marked: str, *, own: bool = True
) -> WordPlaces | None:
    """Of a marked word and, with `own`, of the first `SHOWN` different words of each prompt. None
    if no prompt has the marked word."""
    first = [backbone.prompts.places(prompt, marked)[:1] for prompt in prompts]
    if not any(first):
        return None
    pairs = [_own_words(backbone, prompt) if own else [] for prompt in prompts]
    count = max(map(len, pairs))
    places, known = [], []
    for start, spoken in zip(first, pairs, strict=True):
        missing = count - len(spoken)
        places.append([*(start or [0]), *(place for _, place in spoken), *[0] * missing])
        known.append([bool(start), *[True] * len(spoken), *[False] * missing])
    return WordPlaces(places, known, [[word for word, _ in spoken] for spoken in pairs])


def _own_words(backbone: Backbone, prompt: str) -> list[tuple[str, int]]:
    """The different words of a prompt, each with the position of its last token; in CLIP, which
    reads from left to right, this is the one that knows the whole word."""
    found: dict[str, int] = {}
    with suppress(ValueError):  # its tokens are not found again in what the encoder reads
        read = backbone.prompts.read(prompt)
        for word, tokens in zip(read.words, read.tokens, strict=True):
            if tokens:
                found.setdefault(word, tokens[-1])
    return list(found.items())[:SHOWN]


def map_sites(backbone: Backbone) -> list[Site]:
    """The layers whose attention maps are shown: cross-attention on the two finest grids. None
    where the text is in one sequence with the picture."""
    return [site for site in select(backbone.sites, "cross") if site.divisor in (1, 2)]


def write_word_maps(
    folder: Path, prompts: Sequence[str], words: Sequence[Sequence[str]], *, pictures: Tensor,
    maps: Tensor,
) -> None:  # fmt: skip
    """Writes `00-<prompt>.maps.png` for each prompt that has words: the picture under the heat of
    each word, beside each other. pictures (n, 3, H, W) in [-1, 1]; maps (n, words, h, w)."""
    for number, (prompt, own) in enumerate(zip(prompts, words, strict=True)):
        if not own:
            continue
        picture = pictures[number].expand(len(own), -1, -1, -1)
        heat = overlay_maps(picture, maps[number, : len(own)])
        sheet = grid([("", heat)], own, cell_side(heat, CELL))
        path = folder / f"{number:02d}-{slug(prompt)}.maps.png"
        path.write_bytes(png_bytes(sheet, {"words": ", ".join(own)}))
