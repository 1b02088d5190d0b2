"""Photos of concepts and class images as a dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from trainer.data.class_images import Pair
from trainer.data.crops import Crop, central
from trainer.data.identity import by_name
from trainer.data.loss_mask import checked_cells
from trainer.data.source import Sample
from trainer.data.tags import FIXED, Tags, drawn

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class View:
    """How photos become samples: the side in pixels, the pixels per latent, whether photos are
    augmented, whether half of them are mirrored, and how the tags of captions vary."""

    side: int
    divisor: int
    augment: bool = False
    flip: bool = False
    tags: Tags = FIXED


class ConceptData:
    """The photos of each concept, then the class images. Each concept is a group; all concepts
    together have the same share of a batch as the class images."""

    rates: Sequence[float] = ()

    def __init__(
        self,
        photos: Sequence[Sequence[Pair]],
        view: View,
        *,
        prior: Sequence[Pair] = (),
        prior_weight: float = 0.0,
        skipped: Sequence[str] = (),
    ) -> None:
        self.view = view
        each = [group for group in (*photos, prior) if group]
        self.pairs = [pair for group in each for pair in group]
        ends = list(accumulate(len(group) for group in each))
        self.groups: Sequence[range] = [
            range(end - len(group), end) for group, end in zip(each, ends, strict=True)
        ]
        own = 1 / len(photos)
        half = (0.5,) if prior else ()
        self.shares: Sequence[float] = (own * (0.5 if prior else 1),) * len(photos) + half
        self.weights: Sequence[float] = (own,) * len(photos) + ((prior_weight,) if prior else ())
        self.frames: Sequence[int] = (1,) * len(each)
        self.num_photos = ends[len(photos) - 1]
        self.fixed = not (view.augment or view.flip)
        self.skipped: Sequence[str] = tuple(skipped)
        self.masks: dict[int, Tensor] = {
            index: checked_cells(
                pair.mask, (view.side, view.side), divisor=view.divisor, name=pair.key
            )
            for index, pair in enumerate(self.pairs)
            if pair.mask is not None
        }

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        from PIL import ImageOps

        from trainer.data.augment import resize_augment
        from trainer.media.images import resize_cover, to_tensor

        pair, caption, view = self.pairs[index], self.caption(index, rng), self.view
        if view.augment and index < self.num_photos:
            image, caption, mask, part = resize_augment(
                pair.image,
                caption,
                size=view.side,
                mask_divisor=view.divisor,
                rng=rng,
                hflip=view.flip,
                painted=pair.mask,
                shape=pair.shape,
            )
            return Sample(image=image, caption=caption, key=pair.key, mask=mask, crop=part)
        photo, own = resize_cover(pair.image, view.side), self.loss_mask(index)
        if view.flip and rng.random() < 0.5:
            photo, own = ImageOps.mirror(photo), None if own is None else own.flip(-1)
        return Sample(image=to_tensor(photo), caption=caption, key=pair.key, mask=own)

    def image(self, index: int) -> Tensor:
        from trainer.media.images import resize_cover, to_tensor

        return to_tensor(resize_cover(self.pairs[index].image, self.view.side))

    def loss_mask(self, index: int) -> Tensor | None:
        """The mask of a photo that is not augmented, see `Masked`."""
        return self.masks.get(index)

    def crop(self, index: int) -> Crop:
        """Of a photo that is not augmented, see `Cropped`."""
        return central(self.pairs[index].shape, (self.view.side, self.view.side))

    def caption(self, index: int, rng: np.random.Generator) -> str:
        tags = self.view.tags if index < self.num_photos else FIXED
        return drawn(self.pairs[index].captions, rng, tags)

    def key(self, index: int) -> str:
        return self.pairs[index].key

    def identity(self) -> dict[str, str]:
        return by_name((pair.key, pair.identity()) for pair in self.pairs)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"concept-1-{self.view.side}".encode())
        for pair in self.pairs:
            digest.update(repr(pair.image.size).encode() + pair.image.tobytes())
        return digest.hexdigest()
