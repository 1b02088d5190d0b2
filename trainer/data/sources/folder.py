"""Data source `folder`: a folder of photos with captions beside them, in the layouts that people
have.

`media/photo_listing.py` says which files are photos, `media/photo_captions.py` where captions are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator, model_validator

from trainer.data.buckets import check_step
from trainer.data.decoded import Decoded
from trainer.data.folder_photos import Masks, Photos, Row
from trainer.data.source import Caption, Dataset, Needs, Source
from trainer.data.source_checks import check_split
from trainer.data.source_options import (
    Buckets,
    CaptionFrom,
    CaptionLines,
    KeepTags,
    Mirror,
    OnBad,
    Recursive,
    ShuffleTags,
    idle_tags,
)
from trainer.data.tags import Tags
from trainer.media.images import ImageError
from trainer.media.photo_captions import CaptionRules, Captions
from trainer.media.photo_folder import Photo, read_folder
from trainer.media.photo_listing import READABLE_IMAGES, Listing, list_photos, unread
from trainer.media.photo_report import found_in
from trainer.media.reference_files import check_alike

CHECKED_SIDE = (
    16  # photos are decoded to check them, and only a small copy of this side is kept meanwhile
)


class Folder(Source):
    """Photos of a folder, each with its caption."""

    recursive: Recursive = False  # first, because the folder is looked into when it is read
    folder: Path = Field(
        description="a folder of photos: JPEG, PNG, WebP, BMP, TIFF or HEIC (the extra heic)",
        examples=["./pictures"],
    )
    template: str | None = Field(
        default=None, description="the caption of photos without one; null refuses such photos"
    )
    caption_from: CaptionFrom = None
    caption_lines: CaptionLines = False
    shuffle_tags: ShuffleTags = False
    keep_tags: KeepTags = 0
    repeats: int = Field(
        default=1,
        gt=0,
        description="how often an epoch has each photo, times the number of a folder like 10_dog",
    )
    on_bad: OnBad = "raise"
    validation: int = Field(
        default=0, ge=0, description="photos to hold out for the validation loss, the last by name"
    )
    flip: Mirror = False
    buckets: Buckets = 0

    @field_validator("folder")
    @classmethod
    def _holds_images(cls, folder: Path, info: ValidationInfo) -> Path:
        folder = folder.expanduser()
        list_photos(folder, bool(info.data.get("recursive")))
        return folder

    @field_validator("template")
    @classmethod
    def _is_a_caption(cls, template: str | None) -> str | None:
        if template is not None and ("{" in template or not template.strip()):
            raise ValueError(
                "write the caption itself, such as 'a photo of a cat'; it must not be blank, "
                "and {} is not replaced here"
            )
        return template

    @model_validator(mode="after")
    def _every_image_has_a_caption(self) -> Folder:
        captions = self.read
        photos = captions.listing.photos
        check_split(self.validation, len(photos), f"images in {self.folder}")
        check_alike(photos, captions.listing.references)
        for path in photos:
            # `open` reports or skips files that are not readable images
            if (
                self.template is None
                and path.suffix.lower() in READABLE_IMAGES
                and not captions.has(path)
            ):
                raise _no_caption(path)
        return self

    def idle(self) -> dict[str, str]:
        return idle_tags(self.shuffle_tags)

    def captions(self) -> Iterator[Caption]:
        captions = self.read
        for path in captions.listing.photos:
            with suppress(ImageError):  # `open` reports or skips it
                if (found := captions.of(path)) is not None:
                    for text in found.texts:
                        yield found.where, text, None
                elif self.template is not None:
                    yield "data.template", self.template, None

    def found(self) -> list[str]:
        return found_in(self.read, self.template is not None, self.repeats)

    def remarks(self) -> list[str]:
        return unread(self.read.listing)

    def stored(self) -> int:
        return self.read.listing.stored()

    def epoch(self) -> int:
        listing = self.read.listing
        train = listing.photos[: len(listing.photos) - self.validation]
        return self.repeats * sum(map(listing.repeats, train))

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        """Decodes every photo once, so that a bad one is found before training starts.

        Raises:
            ImageError: photos or captions that cannot be used, all of them in one message.
            ValueError: no more than `validation` photos are usable.
        """
        check_step(self.buckets, needs.divisor)
        listing = self.read.listing
        decoded = Decoded(needs.cache, needs.resolution, self.buckets)
        photos, bad = read_folder(self.read, self.on_bad, CHECKED_SIDE, opener=decoded.check)
        rows = [self._row(photo, listing) for photo in photos]
        check_split(self.validation, len(rows), f"usable images in {self.folder}")
        skipped = [f"{listing.name(path)}: {text.removeprefix(f'{path}: ')}" for path, text in bad]
        cut = len(rows) - self.validation
        side, step = needs.resolution, self.buckets
        masks = Masks(listing.masks, needs.divisor)
        train = Photos(
            rows[:cut],
            side,
            step=step,
            flip=self.flip,
            skipped=skipped,
            masks=masks,
            tags=Tags(self.shuffle_tags, self.keep_tags),
            decoded=decoded,
        )
        if not self.validation:
            return train, None
        # a validation loss is of the same captions every time
        seen = [replace(row, captions=row.captions[:1], repeats=1) for row in rows[cut:]]
        return train, Photos(seen, side, step=step, masks=masks, decoded=decoded)

    def _row(self, photo: Photo, listing: Listing) -> Row:
        captions = photo.captions or (() if self.template is None else (self.template,))
        if not captions:
            raise _no_caption(photo.path)
        times = self.repeats * listing.repeats(photo.path)
        references = listing.references.get(photo.path, ())
        return Row(
            photo.path, captions, listing.name(photo.path), repeats=times, references=references
        )

    @cached_property
    def read(self) -> Captions:
        """What lies in the folder; listed and read once for all that asks."""
        # a template is for all photos without a caption file
        rules = CaptionRules(
            self.caption_lines,
            self.caption_from,
            subjects=self.template is None or self.caption_from == "folder",
        )
        return Captions(list_photos(self.folder, self.recursive), rules)


def _no_caption(path: Path) -> ValueError:
    return ValueError(
        f"no caption for {path}: write it into {path.with_suffix('.txt').name} beside it or into "
        "metadata.jsonl, or set data.template, a caption for all images without one"
    )
