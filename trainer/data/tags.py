"""Which caption of a photo a training step uses: one of several, and its tags in another order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Tags:
    """shuffle: whether the parts of a caption between commas change places at each use; keep: how
    many, at the front, stay where they are."""

    shuffle: bool = False
    keep: int = 0


FIXED = Tags()


def drawn(captions: Sequence[str], rng: np.random.Generator, tags: Tags = FIXED) -> str:
    """One of the captions of a photo. With one caption and no shuffling nothing is drawn from
    `rng`, so that what is drawn after it stays what it was."""
    caption = captions[0] if len(captions) == 1 else captions[int(rng.integers(len(captions)))]
    return shuffled(caption, tags.keep, rng) if tags.shuffle else caption


def farthest(caption: str, word: str, tags: Tags) -> str:
    """A caption with its tags in an order that `drawn` may give, in which the last tag with `word`
    is behind all others."""
    parts = [part.strip() for part in caption.split(",") if part.strip()]
    behind = parts[tags.keep :]
    if not tags.shuffle or len(behind) < 2 or any(word in part for part in parts[: tags.keep]):
        return caption
    order = sorted(behind, key=lambda part: word in part)
    return ", ".join([*parts[: tags.keep], *order])


def shuffled(caption: str, keep: int, rng: np.random.Generator) -> str:
    """A caption with its tags, the parts between commas, in another order behind the first `keep`.
    Empty parts are left out."""
    parts = [part.strip() for part in caption.split(",") if part.strip()]
    behind = parts[keep:]
    if len(behind) < 2:
        return caption
    order = rng.permutation(len(behind))
    return ", ".join([*parts[:keep], *(behind[place] for place in order)])
