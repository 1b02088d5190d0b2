"""The photos of a concept with their captions: a folder of a user's, or scenes of a sprite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trainer.common.articles import article_of
from trainer.common.suggest import nearest
from trainer.data.augment import CLOSE_PREFIXES, FAR_PREFIXES, prefixed
from trainer.data.caption_templates import TEMPLATES, render
from trainer.data.class_images import Pair, pair_of
from trainer.data.source_checks import check_split
from trainer.media.images import ImageError, read_image
from trainer.media.photo_captions import CaptionRules, Captions
from trainer.media.photo_folder import Photo, read_folder
from trainer.media.photo_listing import list_photos

if TYPE_CHECKING:
    from PIL import Image

SPRITE = "sprite:"
# as a user would take photos: the thing alone, then beside others. Each is a scene index in the
# world of seed 77, and the other sprite in it
SCENES: tuple[tuple[int, str | None], ...] = (
    (0, None),
    (11, None),
    (9, None),
    (26, "clock"),
    (21, "car"),
)
UNSEEN = range(505, 521)
FILES = CaptionRules(subjects=False)  # the name of a folder is no caption here
HELD_OUT_FROM = 5  # photos of a concept, of which one is then held out


@dataclass(frozen=True)
class OneConcept:
    """place: a folder of photos, or `sprite:<word>`; token: its new word; kind: its class word;
    recursive: whether subfolders are read; rules: which captions."""

    place: str
    token: str
    kind: str | None
    recursive: bool = False
    rules: CaptionRules = FILES

    @cached_property
    def read(self) -> Captions:
        """What lies in its folder, read once."""
        return Captions(list_photos(self.place, self.recursive), self.rules)

    def trained(self, validation: int | None) -> int:
        """How many photos it trains on, by what lies in its folder."""
        if self.sprite is not None:
            return len(SCENES)
        return max(0, len(self.read.listing.photos) - self.unseen(validation))

    def unseen(self, validation: int | None) -> int:
        """How many photos or scenes it keeps back for the validation loss."""
        if self.sprite is not None:
            return len(UNSEEN)
        return held_out_of(len(self.read.listing.photos), validation)

    def check_held_out(self, validation: int | None) -> None:
        """Raises ValueError where `validation` leaves none of its photos to train on."""
        if self.sprite is None and validation:
            check_split(validation, len(self.read.listing.photos), f"photos in {self.place}")

    def named(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Its photos, called by its folder too: those of other concepts may be called alike."""
        return [replace(pair, key=f"{Path(self.place).name}/{pair.key}") for pair in pairs]

    @property
    def sprite(self) -> str | None:
        return self.place.removeprefix(SPRITE) if self.place.startswith(SPRITE) else None

    @property
    def templates(self) -> tuple[str, ...]:
        """Captions of a photo that has none."""
        phrase = f"{self.token} {self.kind}" if self.kind else self.token
        return tuple(render(template, phrase) for template in TEMPLATES)


def checked_place(concept: str, recursive: bool) -> str:
    """The place of a concept that a user has named; raises ValueError where there is none."""
    if not concept.startswith(SPRITE):
        folder = Path(concept).expanduser()
        list_photos(folder, recursive)
        return str(folder)
    from trainer.data.world.sprites import ALL

    word = concept.removeprefix(SPRITE)
    if word not in ALL:
        raise ValueError(f"no sprite is called {word}{nearest(word, ALL)}")
    return concept


def held_out_of(count: int, validation: int | None) -> int:
    """How many of a concept's photos are held out, where `validation` was asked for."""
    return int(count >= HELD_OUT_FROM) if validation is None else validation


def photos_of(
    concept: OneConcept,
    on_bad: Literal["raise", "skip"],
    validation: int | None,
    *,
    opener: Callable[[Path], Image.Image] = read_image,
) -> tuple[list[Pair], list[str], list[Pair]]:
    """Training photos, a sentence for each skipped one, and held-out photos, if any. validation:
    how many to hold out, None for one of `HELD_OUT_FROM` or more; opener: as of `read_folder`.

    Raises:
        ValueError: a caption without the token, or no photo is left to train on.
    """
    if concept.sprite is not None:
        unseen = [(index, None) for index in UNSEEN]
        return _scenes(concept, SCENES), [], _scenes(concept, unseen)
    listing = concept.read.listing
    photos, skipped = read_folder(concept.read, on_bad, opener=opener)
    pairs = [_pair(photo, concept) for photo in photos]
    validation = held_out_of(len(pairs), validation)
    check_split(validation, len(pairs), f"photos in {concept.place}")
    cut = len(pairs) - validation
    left_out = [f"{listing.name(path)}: {reason}" for path, reason in skipped]
    return pairs[:cut], left_out, pairs[cut:]


def _pair(photo: Photo, concept: OneConcept) -> Pair:
    captions = photo.captions or concept.templates
    if any(concept.token not in caption for caption in captions):
        found = concept.read.of(photo.path)
        where = found.where if found else photo.path
        raise ValueError(f"{where}: the caption must contain the token {concept.token}")
    return pair_of(photo, captions, concept.read.listing)


def captions_of(concept: OneConcept, augment: bool) -> Iterator[tuple[str, str]]:
    """The name and the text of every caption that training may use: of a file, or of a template."""
    if concept.sprite is not None:
        own = [(pair.key, pair.captions[0]) for pair in _scenes(concept, SCENES)]
    else:
        own = []
        captions = concept.read
        for path in captions.listing.photos:
            with suppress(ImageError):  # reading reports or skips it
                found = captions.of(path)
                if found is not None:
                    own += [(found.where, text) for text in found.texts]
                else:
                    own += [(f"the caption template {each!r}", each) for each in concept.templates]
    prefixes = (*FAR_PREFIXES, *CLOSE_PREFIXES) if augment else ()
    for name, text in dict.fromkeys(own):
        yield name, text
        for prefix in prefixes:
            yield (
                f"{name} with {prefix.strip()!r} of data.augment before it",
                prefixed(text, prefix),
            )


def _scenes(concept: OneConcept, chosen: Sequence[tuple[int, str | None]]) -> list[Pair]:
    """Scenes of a seed that no backbone was trained on, with the token as the sprite's word."""
    from PIL import Image

    from trainer.data.world.scenes import article, draw_scene

    pairs, word = [], concept.sprite
    assert word is not None, "a concept of scenes is a sprite"
    for index, other in chosen:
        words = (word,) if other in (None, word) else (word, other)
        scene = draw_scene(77, index, words, count=len(words))
        named = f"{article_of(concept.token)} {concept.token}"
        caption = scene.caption.replace(article(word), named).replace(word, concept.token)
        pairs.append(Pair(Image.fromarray(scene.image), (caption,), f"{word}-{index}"))
    return pairs
