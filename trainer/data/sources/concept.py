"""Data source `concept`: a few photos of one thing and its word, with class images that preserve
what the model knows already.

Half of every batch is the concept (or several concepts, in equal parts), half class images: loss =
mean(concept) + prior_weight * mean(class), the prior-preservation loss of DreamBooth (arXiv
2208.12242, equation 2) as Custom Diffusion uses it (arXiv 2212.04488). The class images are
generated once by the frozen backbone and cached, or read from a folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from trainer.common.suggest import nearest
from trainer.data.concept_data import ConceptData, View
from trainer.data.held_out import check_split
from trainer.data.prior import Pair, class_images
from trainer.data.source import Dataset, Needs, Source
from trainer.data.source_options import Mirror, OnBad
from trainer.data.templates import TEMPLATES, render
from trainer.media.photo_folder import list_images, read_folder

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
HELD_OUT_FROM = 5  # photos of a concept, of which one is then held out


class Concept(Source):
    """Half of every batch is the concept, or several concepts in equal parts, and half are class
    images. Several concepts trained jointly are a list of each option, as in
    `concept: [./dog, ./cat]`, `token: [<v1>, <v2>]`, `class_word: [dog, cat]`."""

    concept: str | tuple[str, ...] = Field(
        description="a folder of 4 to 20 photos of one thing, or sprite:<word> for five scenes of "
        "a sprite of the embedded world; a .txt beside a photo is its caption and must contain "
        "the token",
        examples=["./my_dog"],
    )
    token: str | tuple[str, ...] = Field(
        "<v1>", description="the new word for the concept; methods.new_token.tokens names it too"
    )
    class_word: str | tuple[str, ...] | None = Field(
        None,
        description="the kind of thing, as in dog: it follows the token in captions (a photo of "
        "a <v1> dog) and makes the prompts of class images where prior_prompts is empty",
    )
    augment: bool = Field(
        True,
        description="Custom Diffusion's resizing of photos, with words for it in the caption and a "
        "loss on the photo alone (arXiv 2212.04488)",
    )
    flip: Mirror = False
    on_bad: OnBad = "raise"
    validation: int | None = Field(
        None,
        ge=0,
        description="photos of each concept to hold out for the validation loss, the last by name; "
        "null holds out one where there are five or more, 0 none",
    )
    prior_images: int = Field(
        200,
        ge=0,
        description="class images that the frozen backbone generates once and the cache keeps "
        "(200 in Custom Diffusion)",
    )
    prior_prompts: tuple[str, ...] = Field(
        (),
        description="prompts of the class images, in turn; empty asks for a photo of a "
        "<class_word>",
    )
    prior_folder: Path | None = Field(
        None, description="a folder of class images to take in place of generated ones"
    )
    prior_weight: float = Field(
        1.0,
        ge=0,
        description="weight of the class images in the loss (DreamBooth, arXiv 2208.12242, "
        "equation 2); 0 uses no class images",
    )
    prior_seed: int = Field(0, ge=0, description="seed of the class images")
    prior_guidance: float | None = Field(
        None,
        ge=0,
        description="guidance scale of the class images; null takes preview.guidance. What is "
        "learned from guided images is guided again in sampling",
    )

    @property
    def words(self) -> tuple[str, ...]:
        return _listed(self.token)

    @property
    def concepts(self) -> list[tuple[str, str, str | None]]:
        """(concept, token, class word) of each."""
        folders = _listed(self.concept)
        words = _listed(self.class_word) if self.class_word else [None] * len(folders)
        return list(zip(folders, _listed(self.token), words, strict=True))

    @field_validator("concept")
    @classmethod
    def _are_there(cls, concept: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(concept, str):
            return cls._is_there(concept)
        if not concept:
            raise ValueError("the list is empty; name a folder of photos")
        return tuple(cls._is_there(each) for each in concept)

    @classmethod
    def _is_there(cls, concept: str) -> str:
        if not concept.startswith(SPRITE):
            folder = Path(concept).expanduser()
            list_images(folder)
            return str(folder)
        from trainer.data.world.sprites import ALL

        word = concept.removeprefix(SPRITE)
        if word not in ALL:
            raise ValueError(f"no sprite is called {word}{nearest(word, ALL)}")
        return concept

    @field_validator("prior_folder")
    @classmethod
    def _holds_images(cls, folder: Path | None) -> Path | None:
        if folder is None:
            return None
        list_images(folder.expanduser())
        return folder.expanduser()

    @model_validator(mode="after")
    def _lists_agree(self) -> Concept:
        count, tokens = len(_listed(self.concept)), _listed(self.token)
        if len(tokens) != count or len(set(tokens)) != count:
            raise ValueError(
                f"token={list(tokens)} for {count} concepts; give each a different one, as in "
                f"data.token=[{','.join(f'<v{i + 1}>' for i in range(count))}]"
            )
        if self.class_word is not None and len(_listed(self.class_word)) != count:
            raise ValueError(
                f"class_word={list(_listed(self.class_word))} for {count} concepts; "
                "give one for each"
            )
        return self

    @model_validator(mode="after")
    def _has_class_images(self) -> Concept:
        known = self.prior_folder or self.prior_prompts or self.class_word
        if self.prior_weight > 0 and self.prior_images > 0 and not known:
            raise ValueError(
                "class images need class_word, as in data.class_word=dog; or set prior_weight=0 to "
                "train without class images"
            )
        return self

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        photos, skipped, unseen = [], [], []
        for each in self.concepts:
            seen, bad, more = self._photos(*each)
            photos.append(seen)
            skipped += bad
            unseen += more
        prior = (
            self._prior(needs)
            if self.prior_weight > 0 and (self.prior_images or self.prior_folder)
            else []
        )
        plain = View(side=needs.resolution, divisor=needs.divisor)
        view = replace(plain, augment=self.augment, flip=self.flip)
        train = ConceptData(
            photos, view, prior=prior, prior_weight=self.prior_weight, skipped=skipped
        )
        return train, ConceptData([unseen], plain) if unseen else None

    def _photos(
        self, concept: str, token: str, class_word: str | None
    ) -> tuple[list[Pair], list[str], list[Pair]]:
        """Training photos, a sentence for each skipped one, and held-out photos, if any."""
        if concept.startswith(SPRITE):
            word = concept.removeprefix(SPRITE)
            unseen = [(index, None) for index in UNSEEN]
            return _scenes(word, token, SCENES), [], _scenes(word, token, unseen)
        photos, skipped = read_folder(concept, self.on_bad)
        phrase = f"{token} {class_word}" if class_word else token
        pairs = []
        for photo in photos:
            captions = tuple(render(template, phrase) for template in TEMPLATES)
            if photo.caption is not None:
                if token not in photo.caption:
                    raise ValueError(
                        f"{photo.path.with_suffix('.txt')}: the caption must contain the token "
                        f"{token}"
                    )
                captions = (photo.caption,)
            pairs.append(Pair(photo.image, captions, photo.path.name))
        cut = len(pairs) - self._held_out(len(pairs), concept)
        return pairs[:cut], [f"{path.name}: {reason}" for path, reason in skipped], pairs[cut:]

    def _held_out(self, count: int, folder: str) -> int:
        """How many of `count` photos no step trains on."""
        if self.validation is None:
            return int(count >= HELD_OUT_FROM)
        check_split(self.validation, count, f"photos in {folder}")
        return self.validation

    def _prior(self, needs: Needs) -> list[Pair]:
        if self.prior_folder is not None:
            photos, _ = read_folder(self.prior_folder, self.on_bad)
            fallback = self._class_prompts()[:1] or ("",)
            return [
                Pair(photo.image, (photo.caption or fallback[0],), photo.path.name)
                for photo in photos
            ]
        prompts = self.prior_prompts or self._class_prompts()
        every = [prompts[i % len(prompts)] for i in range(self.prior_images)]
        return class_images(every, seed=self.prior_seed, guidance=self.prior_guidance, needs=needs)

    def _class_prompts(self) -> tuple[str, ...]:
        return tuple(f"a photo of a {word}" for _, _, word in self.concepts if word)


def _listed(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else value


def _scenes(word: str, token: str, chosen: Sequence[tuple[int, str | None]]) -> list[Pair]:
    """Scenes of a seed that no backbone was trained on, with the token as the sprite's word."""
    from PIL import Image

    from trainer.data.world.scenes import draw_scene

    pairs = []
    for index, other in chosen:
        words = (word,) if other in (None, word) else (word, other)
        scene = draw_scene(77, index, words, count=len(words))
        caption = scene.caption.replace(f"an {word}", f"a {word}").replace(word, token)
        pairs.append(Pair(Image.fromarray(scene.image), (caption,), f"{word}-{index}"))
    return pairs
