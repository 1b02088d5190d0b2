"""Clips and still images as one dataset; a batch has only clips or only images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from trainer.data.crops import Crop, Cropped, whole
from trainer.data.depth import Layered
from trainer.data.identity import by_name
from trainer.data.loss_mask import Masked
from trainer.data.source import Dataset, Repeated, Sample

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Mixed:
    """The samples of `clips`, then those of `stills`. images: the share of batches of `stills`."""

    def __init__(self, clips: Dataset, stills: Dataset, images: float) -> None:
        self.parts = (clips, stills)
        shares = ([(1 - images) * share for share in clips.shares], stills.shares)
        self.shares: Sequence[float] = [*shares[0], *(images * share for share in shares[1])]
        self.weights: Sequence[float] = [*clips.weights, *stills.weights]
        self.frames: Sequence[int] = [*clips.frames, *stills.frames]
        self.rates = clips.rates
        moved = (range(len(clips) + g.start, len(clips) + g.stop) for g in stills.groups)
        self.groups: Sequence[range] = [*clips.groups, *moved]
        self.repeats: Sequence[int] = [
            times
            for part in self.parts
            for times in (part.repeats if isinstance(part, Repeated) else [1] * len(part))
        ]
        self.fixed = clips.fixed and stills.fixed
        self.skipped: Sequence[str] = list(chain(clips.skipped, stills.skipped))

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        part, own = self._part(index)
        return part.sample(own, rng)

    def image(self, index: int) -> Tensor:
        part, own = self._part(index)
        return part.image(own)

    def caption(self, index: int, rng: np.random.Generator) -> str:
        part, own = self._part(index)
        return part.caption(own, rng)

    def loss_mask(self, index: int) -> Tensor | None:
        part, own = self._part(index)
        return part.loss_mask(own) if isinstance(part, Masked) else None

    def crop(self, index: int) -> Crop:
        """See `Cropped`."""
        part, own = self._part(index)
        return part.crop(own) if isinstance(part, Cropped) else whole(part.image(own))

    def depth(self, index: int) -> Tensor | None:
        """See `Layered`."""
        part, own = self._part(index)
        return part.depth(own) if isinstance(part, Layered) else None

    def key(self, index: int) -> str:
        part, own = self._part(index)
        return part.key(own)

    def identity(self) -> dict[str, str]:
        return by_name(row for part in self.parts for row in part.identity().items())

    def fingerprint(self) -> str:
        both = [part.fingerprint() for part in self.parts]
        return hashlib.sha256(repr(("mixed-1", both)).encode()).hexdigest()

    def _part(self, index: int) -> tuple[Dataset, int]:
        clips, stills = self.parts
        return (clips, index) if index < len(clips) else (stills, index - len(clips))


class Stills:
    """The middle frame of every clip as an image."""

    rates: Sequence[float] = ()
    skipped: Sequence[str] = ()

    def __init__(self, clips: Dataset) -> None:
        self.clips, self.fixed = clips, clips.fixed
        self.groups, self.shares, self.weights = clips.groups, clips.shares, clips.weights
        self.frames: Sequence[int] = (1,) * len(clips.groups)

    def __len__(self) -> int:
        return len(self.clips)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        found = self.clips.sample(index, rng)
        image = _middle(found.image)
        return Sample(image=image, caption=found.caption, key=found.key, crop=found.crop)

    def image(self, index: int) -> Tensor:
        return _middle(self.clips.image(index))

    def crop(self, index: int) -> Crop:
        """See `Cropped`."""
        clips = self.clips
        return clips.crop(index) if isinstance(clips, Cropped) else whole(self.image(index))

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return self.clips.caption(index, rng)

    def key(self, index: int) -> str:
        return self.clips.key(index)

    def identity(self) -> dict[str, str]:
        """Empty: they are in the clips, which the same run trains on."""
        return {}

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(("stills-1", self.clips.fingerprint())).encode()).hexdigest()


def _middle(frames: Tensor) -> Tensor:
    return frames[len(frames) // 2].clone()  # a view would keep the complete clip in memory
