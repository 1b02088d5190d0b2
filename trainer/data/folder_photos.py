"""Photos of a folder as a dataset, each with captions, a mask, and how often it is repeated."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.buckets import Size, arrange
from trainer.data.crops import Crop, central
from trainer.data.decoded import Decoded
from trainer.data.identity import by_name, captioned, sha256_of_file
from trainer.data.loss_mask import checked_cells
from trainer.data.source import Sample
from trainer.data.source_checks import KEEP_BYTES
from trainer.data.tags import FIXED, Tags, drawn
from trainer.media.images import upright_size
from trainer.media.mask_files import read_mask
from trainer.media.reference_files import reference_picture

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class Row:
    """A photo of a data set: its file, the captions of which each use takes one, the name that it
    has in the data, how often an epoch has it, and its reference pictures."""

    path: Path
    captions: tuple[str, ...]
    key: str
    repeats: int = 1
    references: tuple[Path, ...] = ()


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
    """Photos, each scaled to cover its size and cut to the centre. The size is a square of `side`,
    or with `step` that of a bucket, see `buckets.py`. tags: how captions vary; decoded: where large
    photos are kept, None for nowhere."""

    rates: Sequence[float] = ()

    def __init__(
        self,
        rows: Sequence[Row],
        side: int,
        *,
        step: int = 0,
        flip: bool = False,
        skipped: Sequence[str] = (),
        masks: Masks | None = None,
        tags: Tags = FIXED,
        decoded: Decoded | None = None,
    ) -> None:
        self.side, self.flip, self.skipped, self.step = side, flip, skipped, step
        self.tags = tags
        self.decoded = decoded or Decoded(None, side)
        square = [(side, side)] * len(rows)
        shapes = [upright_size(row.path) for row in rows] if step else square
        order, groups, sizes = arrange(shapes, side, step)
        self.rows = [rows[i] for i in order]
        self.repeats: Sequence[int] = tuple(row.repeats for row in self.rows)
        self.groups: Sequence[range] = tuple(groups)
        self.sizes = sizes
        total = sum(self.repeats)
        self.shares: Sequence[float] = tuple(
            sum(self.repeats[group.start : group.stop]) / total for group in groups
        )
        self.weights: Sequence[float] = (1.0,) * len(groups)
        self.frames: Sequence[int] = (1,) * len(groups)
        self.fixed = not flip and len(sizes) == 1
        self._kept: dict[int, Image] = {}
        self._shapes: dict[int, Size] = {}
        self.masks: dict[int, Tensor] = {}
        for index, row in enumerate(self.rows):
            cells = None if masks is None else masks.cells(row.path, self._size(index))
            if cells is not None:
                self.masks[index] = cells

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Image and caption; raises ImageError if the file has become unreadable."""
        caption = self.caption(index, rng)  # drawn first, as where latents are cached
        image, mask = self.image(index), self.loss_mask(index)
        if self.flip and rng.random() < 0.5:
            image, mask = image.flip(-1), None if mask is None else mask.flip(-1)
        return Sample(image=image, caption=caption, key=self.key(index), mask=mask)

    def key(self, index: int) -> str:
        return self.rows[index].key

    def image(self, index: int) -> Tensor:
        """The photo without mirroring, float32 (3, H, W) in [-1, 1]; raises as `sample`."""
        from trainer.media.images import to_tensor

        return to_tensor(self._cut(index))

    def loss_mask(self, index: int) -> Tensor | None:
        """The mask without mirroring, see `Masked`."""
        return self.masks.get(index)

    def reference(self, index: int) -> Tensor | None:
        """See `Referenced`."""
        import torch

        own = self.rows[index].references
        return torch.stack([reference_picture(path, self.side) for path in own]) if own else None

    def crop(self, index: int) -> Crop:
        """See `Cropped`."""
        return central(self._shape(index), self._size(index))

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return drawn(self.rows[index].captions, rng, self.tags)

    def fingerprint(self) -> str:
        """SHA-256 of every file's bytes, in order, and of the options that change the images."""
        cut = f"-{self.sizes}" if self.step else ""
        digest = hashlib.sha256(f"folder-1-{self.side}-{self.flip}{cut}".encode())
        for row in self.rows:
            # a digest of digests, which changes when bytes move from one file to the next
            digest.update(bytes.fromhex(sha256_of_file(row.path)))
        return digest.hexdigest()

    def identity(self) -> dict[str, str]:
        return by_name((row.key, self._identity(index, row)) for index, row in enumerate(self.rows))

    def _identity(self, index: int, row: Row) -> str:
        picture, mask = sha256_of_file(row.path), self._mask_digest(index)
        if row.references:  # a change of theirs is one of the sample
            own = " ".join((picture, *map(sha256_of_file, row.references)))
            picture = hashlib.sha256(own.encode()).hexdigest()
        return captioned(picture, row.captions, mask, repeats=row.repeats)

    def _mask_digest(self, index: int) -> str | None:
        mask = self.masks.get(index)
        return None if mask is None else hashlib.sha256(mask.numpy().tobytes()).hexdigest()

    def _cut(self, index: int) -> Image:
        if index in self._kept:
            return self._kept[index]
        image = self.decoded.cut(self.rows[index].path, self._size(index))
        if len(self.rows) * self.side**2 * 3 <= KEEP_BYTES:
            self._kept[index] = image
        return image

    def _shape(self, index: int) -> Size:
        if index not in self._shapes:
            self._shapes[index] = upright_size(self.rows[index].path)
        return self._shapes[index]

    def _size(self, index: int) -> Size:
        return next(
            size for group, size in zip(self.groups, self.sizes, strict=True) if index in group
        )

    def __getstate__(self) -> dict[str, Any]:
        # data workers get paths: sending them pixels would take longer than reading the files
        return {**self.__dict__, "_kept": {}}
