"""Data source `concept`: a few photos of one thing and its word, beside class images that keep the
rest in place.

Half of every batch is the concept, half class images: loss = mean(concept) + prior_weight *
mean(class), the prior-preservation loss of DreamBooth (arXiv 2208.12242, equation 2) as Custom
Diffusion uses it (arXiv 2212.04488). The class images are painted once by the frozen backbone and
cached, or read from a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from trainer.data import Dataset, Needs, Sample, Source
from trainer.data.images import list_images, read_folder
from trainer.data.templates import TEMPLATES, render

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

SPRITE = "sprite:"
NUM_SCENES = 5
UNSEEN = 16


class Concept(Source):
    """concept: a folder of photos, or `sprite:<word>` for five scenes of a sprite; token: its new
    word.

    class_word: what it is a kind of, as in `dog`; it follows the token in captions from templates
    (`a photo of a <v1> dog`) and fills the class prompts where `prior_prompts` is empty. A `.txt`
    beside a photo is its caption and must hold the token. augment: Custom Diffusion's resizing with
    its prompt edits and loss mask. prior_images: how many class images; prior_folder: take them
    from there; prior_weight 0 does without.
    """

    concept: str
    token: str = "<v1>"
    class_word: str | None = None
    augment: bool = True
    flip: bool = False
    on_bad: Literal["raise", "skip"] = "raise"
    prior_images: int = Field(200, ge=0)
    prior_prompts: tuple[str, ...] = ()
    prior_folder: Path | None = None
    prior_weight: float = Field(1.0, ge=0)
    prior_seed: int = Field(0, ge=0)

    @field_validator("concept")
    @classmethod
    def _is_there(cls, concept: str) -> str:
        if not concept.startswith(SPRITE):
            folder = Path(concept).expanduser()
            list_images(folder)
            return str(folder)
        from trainer.data.sprites import ALL

        word = concept.removeprefix(SPRITE)
        if word not in ALL:
            near = get_close_matches(word, ALL, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(ALL)}"
            raise ValueError(f"no sprite is called {word}; {hint}")
        return concept

    @field_validator("prior_folder")
    @classmethod
    def _holds_images(cls, folder: Path | None) -> Path | None:
        if folder is None:
            return None
        list_images(folder.expanduser())
        return folder.expanduser()

    @model_validator(mode="after")
    def _has_class_images(self) -> Concept:
        known = self.prior_folder or self.prior_prompts or self.class_word
        if self.prior_weight > 0 and self.prior_images > 0 and not known:
            raise ValueError(
                "class images need class_word, as in data.class_word=dog (or prior_weight=0 to "
                "do without)"
            )
        return self

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        photos, skipped, unseen = self._photos()
        prior = (
            self._prior(needs)
            if self.prior_weight > 0 and (self.prior_images or self.prior_folder)
            else []
        )
        options = (self.augment, self.flip, self.prior_weight, needs.resolution, needs.divisor)
        held_out = ConceptData(unseen or photos, [], (False, False, 0.0, *options[3:]), [])
        return ConceptData(photos, prior, options, skipped), held_out

    def _photos(self) -> tuple[list[Pair], list[str], list[Pair]]:
        if self.concept.startswith(SPRITE):
            drawn = _scenes(self.concept.removeprefix(SPRITE), self.token, NUM_SCENES + UNSEEN)
            return drawn[:NUM_SCENES], [], drawn[NUM_SCENES:]
        photos, skipped = read_folder(self.concept, self.on_bad)
        phrase = f"{self.token} {self.class_word}" if self.class_word else self.token
        pairs = []
        for photo in photos:
            captions = tuple(render(template, phrase) for template in TEMPLATES)
            if photo.caption is not None:
                if self.token not in photo.caption:
                    raise ValueError(
                        f"{photo.path.with_suffix('.txt')}: the caption must hold the token "
                        f"{self.token}"
                    )
                captions = (photo.caption,)
            pairs.append(Pair(photo.image, captions, photo.path.name))
        return pairs, [f"{path.name}: {reason}" for path, reason in skipped], []

    def _prior(self, needs: Needs) -> list[Pair]:
        if self.prior_folder is not None:
            photos, _ = read_folder(self.prior_folder, self.on_bad)
            fallback = f"a photo of a {self.class_word}" if self.class_word else ""
            return [
                Pair(photo.image, (photo.caption or fallback,), photo.path.name) for photo in photos
            ]
        prompts = self.prior_prompts or (f"a photo of a {self.class_word}",)
        return painted(
            [prompts[i % len(prompts)] for i in range(self.prior_images)], self.prior_seed, needs
        )


@dataclass(frozen=True)
class Pair:
    """An RGB image of any size and the captions that are true of it."""

    image: Image.Image
    captions: tuple[str, ...]
    key: str


class ConceptData:
    """Concept photos first, class images after them; each group fills its share of every batch."""

    def __init__(
        self,
        photos: Sequence[Pair],
        prior: Sequence[Pair],
        options: tuple[bool, bool, float, int, int],
        skipped: Sequence[str],
    ) -> None:
        self.augment, self.flip, prior_weight, self.side, self.divisor = options
        self.pairs = [*photos, *prior]
        both = len(prior) > 0
        every = (range(len(photos)), range(len(photos), len(self.pairs)))
        self.groups: Sequence[range] = every[: 1 + both]
        self.shares: Sequence[float] = (0.5, 0.5) if both else (1.0,)
        self.weights: Sequence[float] = (1.0, prior_weight) if both else (1.0,)
        self.fixed = not (self.augment or self.flip)
        self.skipped: Sequence[str] = tuple(skipped)

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        from PIL import ImageOps

        from trainer.data.augment import resize_augment
        from trainer.data.images import resize_cover, to_tensor

        pair, caption = self.pairs[index], self.caption(index, rng)
        if self.augment and index in self.groups[0]:
            image, caption, mask = resize_augment(
                pair.image, caption, self.side, self.divisor, rng, self.flip
            )
            return Sample(image, caption, pair.key, mask)
        photo = resize_cover(pair.image, self.side)
        if self.flip and rng.random() < 0.5:
            photo = ImageOps.mirror(photo)
        return Sample(to_tensor(photo), caption, pair.key)

    def image(self, index: int) -> Tensor:
        from trainer.data.images import resize_cover, to_tensor

        return to_tensor(resize_cover(self.pairs[index].image, self.side))

    def caption(self, index: int, rng: np.random.Generator) -> str:
        captions = self.pairs[index].captions
        return captions[int(rng.integers(len(captions)))]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"concept-1-{self.side}".encode())
        for pair in self.pairs:
            digest.update(repr(pair.image.size).encode() + pair.image.tobytes())
        return digest.hexdigest()


def painted(prompts: Sequence[str], seed: int, needs: Needs) -> list[Pair]:
    """One class image per prompt, painted by the frozen backbone once and kept in the cache as
    PNG."""
    from trainer.data.images import read_image

    identity = json.dumps([needs.backbone(), needs.resolution, seed, list(prompts)])
    folder = needs.cache / "prior" / hashlib.sha256(identity.encode()).hexdigest()[:24]
    if not folder.is_dir():
        part = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            part.mkdir(parents=True)
            for number, image in enumerate(needs.paint(prompts, seed)):
                image.save(part / f"{number:05d}.png")
            os.replace(part, folder)  # the name appears only when every image is there
        except OSError:
            if not folder.is_dir():  # another rank may have been first
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return [
        Pair(read_image(folder / f"{number:05d}.png"), (prompt,), f"prior-{number}")
        for number, prompt in enumerate(prompts)
    ]


def _scenes(word: str, token: str, count: int) -> list[Pair]:
    """One-sprite scenes of a world no backbone was trained on, the sprite's word replaced by the
    token."""
    from PIL import Image

    from trainer.data.scenes import draw

    pairs = []
    for index in range(count):
        scene = draw(77, index, (word,), count=1)
        caption = scene.caption.replace(f"an {word}", f"a {word}").replace(word, token)
        pairs.append(Pair(Image.fromarray(scene.image), (caption,), f"{word}-{index}"))
    return pairs
