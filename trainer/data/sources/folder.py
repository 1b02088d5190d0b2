"""Data source `folder`: a folder of photos with a caption beside each, `cat.txt` for `cat.jpg`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from trainer.data.buckets import arrange, check_step, cover, upright_size
from trainer.data.held_out import KEEP_BYTES, check_split, is_told
from trainer.data.source import Dataset, Needs, Sample, Source
from trainer.data.source_options import Buckets, Mirror, OnBad
from trainer.media.images import (
    READABLE_IMAGES,
    list_images,
    read_folder,
    read_image,
)

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

CHECKED_SIDE = 16  # photos are decoded whole to check them, and only this much is held meanwhile


class Folder(Source):
    """Photos of a folder, each with its caption."""

    folder: Path = Field(
        description="a folder of JPEG, PNG or WebP photos; subfolders are not read",
        examples=["./pictures"],
    )
    template: str | None = Field(
        default=None, description="the caption of photos without a .txt; null refuses such photos"
    )
    on_bad: OnBad = "raise"
    validation: int = Field(
        default=0, ge=0, description="photos to hold out for the validation loss, the last by name"
    )
    flip: Mirror = False
    buckets: Buckets = 0

    @field_validator("folder")
    @classmethod
    def _holds_images(cls, folder: Path) -> Path:
        folder = folder.expanduser()
        list_images(folder)
        return folder

    @field_validator("template")
    @classmethod
    def _is_a_caption(cls, template: str | None) -> str | None:
        if template is not None and ("{" in template or not template.strip()):
            raise ValueError(
                "write the caption as it is, such as 'a photo of a cat'; it is not blank, and no "
                "concept stands here for {}"
            )
        return template

    @model_validator(mode="after")
    def _every_image_has_a_caption(self) -> Folder:
        paths = list_images(self.folder)
        check_split(self.validation, len(paths), f"images in {self.folder}")
        for path in paths:
            # The others are refused or skipped in `open`, whatever stands beside them.
            if (
                self.template is None
                and path.suffix.lower() in READABLE_IMAGES
                and not is_told(path)
            ):
                raise _no_caption(path)
        return self

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        """Decodes every photo once, so that a bad one ends or leaves the run now and not later.

        Raises:
            ImageError: photos or captions that cannot be used, all of them in one message.
            ValueError: what is left after skipping is no more than `validation`.
        """
        check_step(self.buckets, needs.divisor)
        photos, bad = read_folder(self.folder, self.on_bad, CHECKED_SIDE)
        pairs = []
        for photo in photos:
            caption = self.template if photo.caption is None else photo.caption
            if caption is None:
                raise _no_caption(photo.path)
            pairs.append((photo.path, caption))
        check_split(self.validation, len(pairs), f"usable images in {self.folder}")
        skipped = [f"{path.name}: {text.removeprefix(f'{path}: ')}" for path, text in bad]
        cut = len(pairs) - self.validation
        train = Photos(pairs[:cut], needs.resolution, self.flip, skipped, self.buckets)
        if not self.validation:
            return train, None
        return train, Photos(pairs[cut:], needs.resolution, False, (), self.buckets)


class Photos:
    """Photos of a folder, scaled until they cover their size, its centre cut out: a square of
    `side`, or with `step` a bucket of as many pixels, see `buckets.py`."""

    rates: Sequence[float] = ()

    def __init__(
        self,
        pairs: Sequence[tuple[Path, str]],
        side: int,
        flip: bool,
        skipped: Sequence[str],
        step: int = 0,
    ) -> None:
        self.side, self.flip, self.skipped, self.step = side, flip, skipped, step
        shapes = [upright_size(path) for path, _ in pairs] if step else [(side, side)] * len(pairs)
        order, groups, sizes = arrange(shapes, side, step)
        self.pairs = [pairs[i] for i in order]
        self.groups: Sequence[range] = tuple(groups)
        self.sizes = sizes
        self.shares: Sequence[float] = tuple(len(group) / len(pairs) for group in groups)
        self.weights: Sequence[float] = (1.0,) * len(groups)
        self.frames: Sequence[int] = (1,) * len(groups)
        self.fixed = not flip and len(sizes) == 1
        self._kept: dict[int, Image] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image and caption; raises ImageError if the file cannot be read any more."""
        path, caption = self.pairs[index]
        image = self.image(index)
        if self.flip and rng.random() < 0.5:
            image = image.flip(-1)
        return Sample(image, caption, path.name)

    def image(self, index: int) -> Tensor:
        """The photo as it is, float32 (3, H, W) in [-1, 1]; raises ImageError as `sample`."""
        from trainer.media.images import to_tensor

        return to_tensor(self._cut(index))

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return self.pairs[index][1]

    def fingerprint(self) -> str:
        """SHA-256 of every file's bytes, in order, and of what is done to them."""
        cut = f"-{self.sizes}" if self.step else ""
        digest = hashlib.sha256(f"folder-1-{self.side}-{self.flip}{cut}".encode())
        for path, _ in self.pairs:
            with path.open("rb") as file:
                # A digest of digests: bytes moved from one file to the next would go unseen.
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _cut(self, index: int) -> Image:
        if index in self._kept:
            return self._kept[index]
        size = next(
            size for group, size in zip(self.groups, self.sizes, strict=True) if index in group
        )
        image = cover(read_image(self.pairs[index][0]), size)
        if len(self.pairs) * self.side**2 * 3 <= KEEP_BYTES:
            self._kept[index] = image
        return image

    def __getstate__(self) -> dict[str, Any]:
        # A worker gets the paths; sending it the pixels would take longer than reading them.
        return {**self.__dict__, "_kept": {}}


def _no_caption(path: Path) -> ValueError:
    return ValueError(
        f"no caption for {path}: write it into {path.with_suffix('.txt').name} beside it, or give "
        "data.template, a caption for all images without one"
    )
