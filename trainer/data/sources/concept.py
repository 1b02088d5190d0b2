"""Data source `concept`: a few photos of one thing and its word, with class images that preserve
what the model knows already.

Half of every batch is the concept (or several concepts, in equal parts), half class images: loss =
mean(concept) + prior_weight * mean(class), the prior-preservation loss of DreamBooth (arXiv
2208.12242, equation 2) as Custom Diffusion uses it (arXiv 2212.04488). The class images are
generated once by the frozen backbone and cached, or read from a folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from trainer.data.augment import largest_scale
from trainer.data.caption_templates import TOKEN, check_phrase, fill
from trainer.data.class_images import ClassFolder, Pair, class_images
from trainer.data.concept_data import ConceptData, View
from trainer.data.concept_idle import idle_of
from trainer.data.concept_photos import OneConcept, captions_of, checked_place, photos_of
from trainer.data.decoded import Decoded
from trainer.data.source import Caption, Dataset, Generation, Needs, Source
from trainer.data.source_options import (
    CaptionFrom,
    CaptionLines,
    KeepTags,
    Mirror,
    OnBad,
    Recursive,
    ShuffleTags,
)
from trainer.data.tags import Tags
from trainer.media.photo_captions import CaptionRules, Captions
from trainer.media.photo_listing import list_photos, unread
from trainer.media.photo_report import found_in

CLASS, CLASS_PROMPT = "{class}", "a photo of a {class}"
Item = TypeVar("Item")


class Concept(Source):
    """Half of every batch is the concept, or several concepts in equal parts, and half are class
    images. Several concepts trained jointly are a list of each option, as in
    `concept: [./dog, ./cat]`, `token: [<v1>, <v2>]`, `class_word: [dog, cat]`."""

    recursive: Recursive = False  # first, because folders are looked into when they are read
    concept: str | tuple[str, ...] = Field(
        description="a folder of 4 to 20 photos of one thing, or sprite:<word> for five scenes of "
        "a sprite of the embedded world; a .txt beside a photo is its caption and must contain "
        "the token, an x_mask.png beside x.jpg is white where its loss counts",
        examples=["./my_dog"],
    )
    token: str | tuple[str, ...] = Field(
        TOKEN, description="the new word for the concept, which methods.new_token adds"
    )
    class_word: str | tuple[str, ...] | None = Field(
        None,
        description="the kind of thing, as in dog: it follows the token in captions (a photo of "
        "a <v1> dog) and makes the prompts of class images where prior_prompts is empty. With "
        "photos it must be given; null leaves captions with the token alone",
    )
    augment: bool = Field(
        True,
        description="Custom Diffusion's resizing of photos, with words for it in the caption and a "
        "loss on the photo alone (arXiv 2212.04488)",
    )
    caption_from: CaptionFrom = None
    caption_lines: CaptionLines = False
    shuffle_tags: ShuffleTags = False
    keep_tags: KeepTags = 0
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
        description="prompts of the class images, in turn, with {class} for class_word; empty asks "
        "for a photo of a {class}. Beside prior_folder: one, the caption of images without one",
    )
    prior_folder: Path | tuple[Path, ...] | None = Field(
        None,
        description="a folder of class images to take in place of generated ones, of several "
        "concepts one each. A .txt beside an image is its caption, else a photo of a {class}",
    )
    prior_weight: float = Field(
        1.0,
        ge=0,
        description="weight of the class images in the loss (DreamBooth, arXiv 2208.12242, "
        "equation 2); 0 uses no class images",
    )
    prior_seed: int = Field(0, ge=0, description="seed of the class images")
    prior_steps: int = Field(25, gt=0, description="steps of the sampler of the class images")
    prior_guidance: float = Field(
        5.0,
        ge=0,
        description="guidance scale of the class images, 1 or less for none. What is learned from "
        "guided images is guided again in sampling",
    )
    prior_sampler: Literal["ddim", "euler", "dpmpp"] | None = Field(
        None,
        description="sampler of the class images: DDIM, Euler or DPM-Solver++; null is the "
        "backbone's own, DDIM on a VP path and Euler on a flow",
    )

    @property
    def words(self) -> tuple[str, ...]:
        return _listed(self.token)

    @property
    def kinds(self) -> tuple[str, ...]:
        return _listed(self.class_word)

    @property
    def groups(self) -> int:
        return len(self.concepts) + self.has_prior

    @property
    def holds_out(self) -> bool:
        return any(each.unseen(self.validation) for each in self.concepts)

    @property
    def has_prior(self) -> bool:
        """Whether class images are trained on."""
        return self.prior_weight > 0 and bool(self.prior_images or self.prior_folder)

    @cached_property
    def concepts(self) -> list[OneConcept]:
        """The concepts in their order."""
        folders = _listed(self.concept)
        kinds = self.kinds or [None] * len(folders)
        rules = CaptionRules(self.caption_lines, self.caption_from, subjects=False)
        return [
            OneConcept(*each, recursive=self.recursive, rules=rules)
            for each in zip(folders, self.words, kinds, strict=True)
        ]

    @cached_property
    def class_folders(self) -> list[ClassFolder]:
        """The folders of class images, each with the caption of images that have none of their
        own."""
        folders, concepts = _listed(self.prior_folder), self.concepts
        given = self.prior_prompts if len(self.prior_prompts) == 1 else (CLASS_PROMPT,)
        kinds: list[str | None] = [None] * len(folders)
        if len(folders) == len(concepts) or len(concepts) == 1:
            kinds = [concepts[min(n, len(concepts) - 1)].kind for n in range(len(folders))]
        return [
            ClassFolder(
                folder,
                None if kind is None and CLASS in given[0] else fill(given[0], None, kind),
                recursive=self.recursive,
            )
            for folder, kind in zip(folders, kinds, strict=True)
        ]

    @property
    def class_prompts(self) -> list[str]:
        """The prompts of generated class images, in turn; with {class}, one for each concept."""
        kinds = list(dict.fromkeys(self.kinds))
        found = []
        for prompt in self.prior_prompts or ((CLASS_PROMPT,) if kinds else ()):
            own: list[str | None] = [*kinds] if CLASS in prompt and kinds else [None]
            found += [fill(prompt, None, kind) for kind in own]
        return found

    @field_validator("concept")
    @classmethod
    def _are_there(
        cls, concept: str | tuple[str, ...], info: ValidationInfo
    ) -> str | tuple[str, ...]:
        recursive = bool(info.data.get("recursive"))
        if isinstance(concept, str):
            return checked_place(concept, recursive)
        if not concept:
            raise ValueError("the list is empty; name a folder of photos")
        return tuple(checked_place(each, recursive) for each in concept)

    @field_validator("class_word", "prior_prompts")
    @classmethod
    def _says_something(
        cls, texts: Item | tuple[Item, ...] | None, info: ValidationInfo
    ) -> Item | tuple[Item, ...] | None:
        for text in _listed(texts):
            check_phrase(str(text), kind=info.field_name == "class_word")
        return texts

    @field_validator("prior_folder")
    @classmethod
    def _holds_images(
        cls, folder: Path | tuple[Path, ...] | None, info: ValidationInfo
    ) -> Path | tuple[Path, ...] | None:
        for each in _listed(folder):
            list_photos(each.expanduser(), bool(info.data.get("recursive")))
        if folder is None or isinstance(folder, Path):
            return folder and folder.expanduser()
        return tuple(each.expanduser() for each in folder)

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
    def _says_what_photos_show(self) -> Concept:
        photos = [each.place for each in self.concepts if each.sprite is None]
        for each in self.concepts:
            each.check_held_out(self.validation)
        if photos and "class_word" not in self.model_fields_set:
            raise ValueError(
                f"class_word is missing, the kind of thing that {photos[0]} shows, as in "
                "data.class_word=dog; or data.class_word=null for captions with the token alone"
            )
        return self

    @model_validator(mode="after")
    def _has_class_images(self) -> Concept:
        if not self.has_prior:
            return self
        for folder in self.class_folders:
            folder.check()
        if not self.prior_folder and not self.class_prompts:
            raise ValueError(
                "class images need class_word, as in data.class_word=dog; or set prior_weight=0 to "
                "train without class images"
            )
        return self

    def idle(self) -> dict[str, str]:
        photos = any(each.sprite is None for each in self.concepts)
        return idle_of(dict(self), photos)

    def _read(self) -> list[Captions]:
        """What lies in each of its folders."""
        own = [each.read for each in self.concepts if each.sprite is None]
        return [*own, *(each.captions for each in self.class_folders)]

    def found(self) -> list[str]:
        return [line for each in self._read() for line in found_in(each, template=True, times=None)]

    def remarks(self) -> list[str]:
        return [line for each in self._read() for line in unread(each.listing)]

    def stored(self) -> int:
        return sum(each.listing.stored() for each in self._read())

    def without_generated(self) -> Concept:
        generates = self.has_prior and not self.prior_folder
        return self.model_copy(update={"prior_images": 0}) if generates else self

    def epoch(self) -> int:
        """The photos of all concepts once, and as many class images."""
        photos = sum(each.trained(self.validation) for each in self.concepts)
        return photos * (2 if self.has_prior else 1)

    def captions(self) -> Iterator[Caption]:
        for concept in self.concepts:
            for name, text in captions_of(concept, self.augment):
                yield name, text, concept.token

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        photos, skipped, unseen = [], [], []
        side = largest_scale(needs.resolution) if self.augment else needs.resolution
        kept = Decoded(needs.cache, side)
        for each in self.concepts:
            seen, bad, more = photos_of(each, self.on_bad, self.validation, opener=kept.shrunk)
            if len(self.concepts) > 1 and each.sprite is None:  # their photos may be called alike
                seen, more = (each.named(pairs) for pairs in (seen, more))
            photos.append(seen)
            skipped += bad
            unseen += more
        plain = View(side=needs.resolution, divisor=needs.divisor)
        tags = Tags(self.shuffle_tags, self.keep_tags)
        view = replace(plain, augment=self.augment, flip=self.flip, tags=tags)
        train = ConceptData(
            photos,
            view,
            prior=self._prior(needs),
            prior_weight=self.prior_weight,
            skipped=skipped,
        )
        return train, ConceptData([unseen], plain) if unseen else None

    def _prior(self, needs: Needs) -> list[Pair]:
        if not self.has_prior:
            return []
        if self.prior_folder:
            shrunk = Decoded(needs.cache, needs.resolution).shrunk
            return [pair for each in self.class_folders for pair in each.read(self.on_bad, shrunk)]
        prompts = self.class_prompts
        every = [prompts[i % len(prompts)] for i in range(self.prior_images)]
        how = Generation(self.prior_steps, self.prior_guidance, self.prior_sampler)
        return class_images(every, self.prior_seed, how, needs=needs)


def _listed(value: Item | tuple[Item, ...] | None) -> tuple[Item, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)
