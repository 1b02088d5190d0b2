"""Data source `folder`: a folder of photos with a caption beside each, `cat.txt` for `cat.jpg`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from trainer.data import Dataset, Needs, Sample, Source
from trainer.data.images import (
    READABLE,
    ImageError,
    list_images,
    read_caption,
    read_folder,
    read_image,
)

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

# Cut photos of a folder that fits are decoded once a process; a larger one is read anew each time.
KEEP_BYTES = 256 * 2**20
CHECKED_SIDE = 16  # photos are decoded whole to check them, and only this much is held meanwhile


class Folder(Source):
    """folder: JPEG, PNG or WebP photos, subfolders are not read; template: caption of photos
    without a .txt; validation: the last so many in natural order are held out; flip: mirror every
    second time, which makes captions that say left or right wrong and latents uncacheable."""

    folder: Path
    template: str | None = None
    on_bad: Literal["raise", "skip"] = "raise"
    validation: int = Field(default=0, ge=0)
    flip: bool = False

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
            if self.template is None and path.suffix.lower() in READABLE and not _is_told(path):
                raise _no_caption(path)
        return self

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        """Decodes every photo once, so that a bad one ends or leaves the run now and not later.

        Raises:
            ImageError: photos or captions that cannot be used, all of them in one message.
            ValueError: what is left after skipping is no more than `validation`.
        """
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
        train = Photos(pairs[:cut], needs.resolution, self.flip, skipped)
        if not self.validation:
            return train, None
        return train, Photos(pairs[cut:], needs.resolution, False, ())


class Photos:
    """Photo i of a folder as sample i, its shorter side scaled to `side` and its centre cut out."""

    shares: Sequence[float] = (1.0,)
    weights: Sequence[float] = (1.0,)

    def __init__(
        self, pairs: Sequence[tuple[Path, str]], side: int, flip: bool, skipped: Sequence[str]
    ) -> None:
        self.pairs, self.side, self.flip, self.skipped = list(pairs), side, flip, skipped
        self.fixed = not flip
        self.groups: Sequence[range] = (range(len(self.pairs)),)
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
        """The photo as it is, float32 (3, side, side) in [-1, 1]; raises ImageError as `sample`."""
        from trainer.data.images import to_tensor

        return to_tensor(self._cut(index))

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return self.pairs[index][1]

    def fingerprint(self) -> str:
        """SHA-256 of every file's bytes, in order, and of what is done to them."""
        digest = hashlib.sha256(f"folder-1-{self.side}-{self.flip}".encode())
        for path, _ in self.pairs:
            with path.open("rb") as file:
                # A digest of digests: bytes moved from one file to the next would go unseen.
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def _cut(self, index: int) -> Image:
        from trainer.data.images import resize_cover

        if index in self._kept:
            return self._kept[index]
        image = resize_cover(read_image(self.pairs[index][0]), self.side)
        if len(self.pairs) * self.side**2 * 3 <= KEEP_BYTES:
            self._kept[index] = image
        return image

    def __getstate__(self) -> dict[str, Any]:
        # A worker gets the paths; sending it the pixels would take longer than reading them.
        return {**self.__dict__, "_kept": {}}


def check_split(validation: int, count: int, what: str) -> None:
    """Raises ValueError if holding out `validation` of `count` samples leaves none to train on."""
    if validation >= count:
        raise ValueError(
            f"validation={validation} leaves none to train on of {count} {what}; "
            f"hold out at most {count - 1}"
        )


def _is_told(path: Path) -> bool:
    try:
        return read_caption(path) is not None
    except ImageError:
        return True  # there is one, and `open` says what is wrong with it


def _no_caption(path: Path) -> ValueError:
    return ValueError(
        f"no caption for {path}: write it into {path.with_suffix('.txt').name} beside it, or give "
        "data.template, a caption for all images without one"
    )
