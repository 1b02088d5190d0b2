"""Data source `folder`: a folder of photos with a caption beside each, `cat.txt` for `cat.jpg`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from trainer.data.buckets import Size, arrange, check_step, cover, upright_size
from trainer.data.held_out import KEEP_BYTES, check_split, has_caption
from trainer.data.identity import by_name, captioned, sha256_of_file
from trainer.data.loss_mask import checked_cells
from trainer.data.source import Caption, Dataset, Needs, Sample, Source
from trainer.data.source_options import Buckets, Mirror, OnBad
from trainer.media.images import ImageError, read_image
from trainer.media.mask_files import read_mask
from trainer.media.photo_folder import (
    READABLE_IMAGES,
    list_images,
    masks_of,
    read_folder,
    unread_files,
)
from trainer.media.read_caption import read_caption

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

CHECKED_SIDE = (
    16  # photos are decoded to check them, and only a small copy of this side is kept meanwhile
)


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
                "write the caption itself, such as 'a photo of a cat'; it must not be blank, "
                "and {} is not replaced here"
            )
        return template

    @model_validator(mode="after")
    def _every_image_has_a_caption(self) -> Folder:
        paths = list_images(self.folder)
        check_split(self.validation, len(paths), f"images in {self.folder}")
        for path in paths:
            # `open` reports or skips files that are not readable images
            if (
                self.template is None
                and path.suffix.lower() in READABLE_IMAGES
                and not has_caption(path)
            ):
                raise _no_caption(path)
        return self

    def captions(self) -> Iterator[Caption]:
        for path in list_images(self.folder):
            with suppress(ImageError):  # `open` reports or skips it
                if (text := read_caption(path)) is not None:
                    yield str(path.with_suffix(".txt")), text, None
                elif self.template is not None:
                    yield "data.template", self.template, None

    def remarks(self) -> list[str]:
        return unread_files(self.folder)

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        """Decodes every photo once, so that a bad one is found before training starts.

        Raises:
            ImageError: photos or captions that cannot be used, all of them in one message.
            ValueError: no more than `validation` photos are usable.
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
        side, step = needs.resolution, self.buckets
        masks = Masks(masks_of(self.folder), needs.divisor)
        train = Photos(pairs[:cut], side, step=step, flip=self.flip, skipped=skipped, masks=masks)
        if not self.validation:
            return train, None
        return train, Photos(pairs[cut:], side, step=step, masks=masks)


@dataclass(frozen=True)
class Masks:
    """The masks of photos by path, and the pixels per latent along an edge."""

    paths: Mapping[Path, Path]
    divisor: int

    def cells(self, photo: Path, size: Size) -> Tensor | None:
        """The mask of a photo that is cut to `size`; ImageError where nothing is left of it."""
        if photo not in self.paths:
            return None
        mask = read_mask(self.paths[photo], upright_size(photo))
        return checked_cells(mask, size, divisor=self.divisor, name=self.paths[photo].name)


class Photos:
    """Photos (path, caption), each scaled to cover its size and cut to the centre. The size is a
    square of `side`, or with `step` that of a bucket, see `buckets.py`."""

    rates: Sequence[float] = ()

    def __init__(
        self,
        pairs: Sequence[tuple[Path, str]],
        side: int,
        *,
        step: int = 0,
        flip: bool = False,
        skipped: Sequence[str] = (),
        masks: Masks | None = None,
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
        self.masks: dict[int, Tensor] = {}
        for index, (path, _) in enumerate(self.pairs):
            cells = None if masks is None else masks.cells(path, self._size(index))
            if cells is not None:
                self.masks[index] = cells

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image and caption; raises ImageError if the file has become unreadable."""
        path, caption = self.pairs[index]
        image, mask = self.image(index), self.loss_mask(index)
        if self.flip and rng.random() < 0.5:
            image, mask = image.flip(-1), None if mask is None else mask.flip(-1)
        return Sample(image=image, caption=caption, key=path.name, mask=mask)

    def key(self, index: int) -> str:
        return self.pairs[index][0].name

    def image(self, index: int) -> Tensor:
        """The photo without mirroring, float32 (3, H, W) in [-1, 1]; raises as `sample`."""
        from trainer.media.images import to_tensor

        return to_tensor(self._cut(index))

    def loss_mask(self, index: int) -> Tensor | None:
        """The mask without mirroring, see `Masked`."""
        return self.masks.get(index)

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return self.pairs[index][1]

    def fingerprint(self) -> str:
        """SHA-256 of every file's bytes, in order, and of the options that change the images."""
        cut = f"-{self.sizes}" if self.step else ""
        digest = hashlib.sha256(f"folder-1-{self.side}-{self.flip}{cut}".encode())
        for path, _ in self.pairs:
            # a digest of digests, which changes when bytes move from one file to the next
            digest.update(bytes.fromhex(sha256_of_file(path)))
        return digest.hexdigest()

    def identity(self) -> dict[str, str]:
        return by_name(
            (path.name, captioned(sha256_of_file(path), [caption], self._mask_digest(index)))
            for index, (path, caption) in enumerate(self.pairs)
        )

    def _mask_digest(self, index: int) -> str | None:
        mask = self.masks.get(index)
        return None if mask is None else hashlib.sha256(mask.numpy().tobytes()).hexdigest()

    def _cut(self, index: int) -> Image:
        if index in self._kept:
            return self._kept[index]
        image = cover(read_image(self.pairs[index][0]), self._size(index))
        if len(self.pairs) * self.side**2 * 3 <= KEEP_BYTES:
            self._kept[index] = image
        return image

    def _size(self, index: int) -> Size:
        return next(
            size for group, size in zip(self.groups, self.sizes, strict=True) if index in group
        )

    def __getstate__(self) -> dict[str, Any]:
        # data workers get paths: sending them pixels would take longer than reading the files
        return {**self.__dict__, "_kept": {}}


def _no_caption(path: Path) -> ValueError:
    return ValueError(
        f"no caption for {path}: write it into {path.with_suffix('.txt').name} beside it, or set "
        "data.template, a caption for all images without one"
    )
