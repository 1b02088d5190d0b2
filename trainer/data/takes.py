"""Clips of videos as a dataset: which moments of a video, read from where, cut to the frame."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.data.held_out import KEEP_BYTES
from trainer.data.source import Sample
from trainer.media.decode import SLACK, VideoFacts, read_clip
from trainer.media.images import ImageError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

# mirrored, a caption with one of these would be wrong
SIDED = re.compile(r"\b(left|right)(ward|wards|most)?\b|clockwise", re.IGNORECASE)


@dataclass(frozen=True)
class Window:
    """Which moments of a video make a clip; the fields are options of the source `video`."""

    frames: int
    stride: int
    fps: float | None
    start: int | Literal["random"]

    def rate(self, film: VideoFacts) -> float:
        """Frames of the clip a second."""
        return self.fps or film.rate / self.stride

    def starts(self, film: VideoFacts, name: str) -> range:
        """The frames it may begin with; raises ImageError if there are none."""
        if self.fps is not None and self.fps > film.rate * (1 + SLACK):
            raise ImageError(
                f"{name}: {film.rate:.4g} frames a second, fewer than data.fps={self.fps:g}; "
                "lower it"
            )
        first = 0 if self.start == "random" else self.start
        span = (self.frames - 1) / self.rate(film)
        spare = floor((film.last - film.first - span) * film.rate + SLACK)
        if spare < first:
            raise ImageError(
                f"{name}: {film.frames} frames at {film.rate:.4g} a second are too short for "
                f"{self.frames} frames at {self.rate(film):.4g} from frame {first}; lower "
                "data.frames, data.stride or data.start"
            )
        return range(first, spare + 1 if self.start == "random" else first + 1)

    def times(self, film: VideoFacts, start: int) -> list[float]:
        """In seconds after the first frame."""
        rate = self.rate(film)
        return [start / film.rate + i / rate for i in range(self.frames)]


@dataclass(frozen=True)
class Take:
    """One video: its file, or what reads its bytes, and then a digest of them."""

    key: str
    caption: str
    film: VideoFacts
    source: Path | Callable[[], bytes]
    digest: str | None = None

    def read(self, window: Window, start: int) -> list[Image]:
        source = self.source if isinstance(self.source, Path) else self.source()
        return read_clip(source, self.key, self.film, window.times(self.film, start))

    def identity(self) -> str:
        if self.digest is not None:
            return self.digest
        assert isinstance(self.source, Path)
        with self.source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class Clips:
    """One clip of video i as sample i, its shorter side scaled to `side`, its centre cut out."""

    shares: Sequence[float] = (1.0,)
    weights: Sequence[float] = (1.0,)

    def __init__(
        self, takes: Sequence[Take], window: Window, side: int, flip: bool, skipped: Sequence[str]
    ) -> None:
        self.takes, self.window, self.side, self.flip = list(takes), window, side, flip
        self.skipped = skipped
        self.fixed = not flip and window.start != "random"
        self.groups: Sequence[range] = (range(len(self.takes)),)
        self.frames: Sequence[int] = (window.frames,)
        self.rates: Sequence[float] = [window.rate(take.film) for take in self.takes]
        self._kept: dict[int, list[Image]] = {}

    def __len__(self) -> int:
        return len(self.takes)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Clip (frames, 3, side, side), every frame cut and mirrored alike; raises ImageError if
        the file cannot be read any more."""
        take = self.takes[index]
        starts = self.window.starts(take.film, take.key)
        clip = self._tensor(index, starts[int(rng.integers(len(starts)))])
        if self.flip and rng.random() < 0.5 and not SIDED.search(take.caption):
            clip = clip.flip(-1)
        return Sample(clip, take.caption, take.key)

    def image(self, index: int) -> Tensor:
        take = self.takes[index]
        return self._tensor(index, self.window.starts(take.film, take.key)[0])

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return self.takes[index].caption

    def fingerprint(self) -> str:
        """SHA-256 over the bytes of every video and what is done to them."""
        done = ("video-1", self.window, self.side, self.flip)
        digest = hashlib.sha256(repr(done).encode())
        for take in self.takes:
            digest.update(take.identity().encode())
        return digest.hexdigest()

    def _tensor(self, index: int, start: int) -> Tensor:
        import torch

        from trainer.media.images import to_tensor

        return torch.stack([to_tensor(frame) for frame in self._cut(index, start)])

    def _cut(self, index: int, start: int) -> list[Image]:
        from trainer.media.images import resize_cover

        if index in self._kept:
            return self._kept[index]
        frames = self.takes[index].read(self.window, start)
        cut = [resize_cover(frame, self.side) for frame in frames]
        held = len(self.takes) * self.window.frames * self.side**2 * 3
        if self.window.start != "random" and held <= KEEP_BYTES:
            self._kept[index] = cut
        return cut

    def __getstate__(self) -> dict[str, Any]:
        # A worker gets the paths; sending it the pixels would take longer than reading them.
        return {**self.__dict__, "_kept": {}}
