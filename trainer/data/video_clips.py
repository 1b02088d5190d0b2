"""Clips cut from videos, as a dataset."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.data.crops import Crop, central
from trainer.data.identity import by_name, captioned, digest_of, sha256_of_file
from trainer.data.source import Sample
from trainer.data.source_checks import KEEP_BYTES
from trainer.media.frame_folders import digest_of_frames, read_frames
from trainer.media.images import ImageError
from trainer.media.read_video import SLACK, VideoFacts, read_clip

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

# a clip whose caption has one of these words is not mirrored: the caption would be wrong
SIDED = re.compile(r"\b(left|right)(ward|wards|most)?\b|clockwise", re.IGNORECASE)


@dataclass(frozen=True)
class Window:
    """Which moments of a video make a clip; the fields are options of the source `video`.

    fps: frames of the clip a second; None takes every `stride`-th frame of the video.
    """

    frames: int
    stride: int
    fps: float | None
    start: int | Literal["random"]

    def rate(self, video: VideoFacts) -> float:
        """Frames of the clip a second."""
        return self.fps or video.rate / self.stride

    def starts(self, video: VideoFacts, name: str) -> range:
        """The frames of the video that a clip may begin with.

        Raises:
            ImageError: the video is too short, or has fewer frames a second than `fps`; the
                message begins with `name`.
        """
        if self.fps is not None and self.fps > video.rate * (1 + SLACK):
            raise ImageError(
                f"{name}: {video.rate:.4g} frames a second, fewer than data.fps={self.fps:g}; "
                "lower it"
            )
        first = 0 if self.start == "random" else self.start
        span = (self.frames - 1) / self.rate(video)
        spare = floor((video.last - video.first - span) * video.rate + SLACK)
        if spare < first:
            raise ImageError(
                f"{name}: {video.frames} frames at {video.rate:.4g} a second are too short for "
                f"{self.frames} frames at {self.rate(video):.4g} from frame {first}; lower "
                "data.frames, data.stride or data.start"
            )
        return range(first, spare + 1 if self.start == "random" else first + 1)

    def times(self, video: VideoFacts, start: int) -> list[float]:
        """The moments of a clip that begins with frame `start`, in seconds after the first frame of
        the video."""
        rate = self.rate(video)
        return [start / video.rate + i / rate for i in range(self.frames)]


@dataclass(frozen=True)
class CaptionedVideo:
    """One video and its caption.

    source: its file, a folder of its frames, or a function that reads its bytes; digest:
    identifies those bytes, needed only with a function.
    """

    key: str
    caption: str
    facts: VideoFacts
    source: Path | Callable[[], bytes]
    digest: str | None = None

    def read(self, window: Window, start: int) -> list[Image]:
        """The frames of the clip that begins with frame `start`."""
        times = window.times(self.facts, start)
        if isinstance(self.source, Path) and self.source.is_dir():
            return read_frames(self.source, self.key, video=self.facts, times=times)
        source = self.source if isinstance(self.source, Path) else self.source()
        return read_clip(source, self.key, video=self.facts, times=times)

    def identity(self) -> str:
        """A digest of the video's bytes."""
        if self.digest is not None:
            return self.digest
        assert isinstance(self.source, Path)
        if self.source.is_dir():
            return digest_of_frames(self.source)
        return sha256_of_file(self.source)


class VideoClips:
    """Sample i is a clip of video i: the central square, `side` pixels wide. flip: mirror half of
    the clips. skipped: what was left out, a sentence each."""

    shares: Sequence[float] = (1.0,)
    weights: Sequence[float] = (1.0,)

    def __init__(
        self,
        videos: Sequence[CaptionedVideo],
        window: Window,
        *,
        side: int,
        flip: bool,
        skipped: Sequence[str] = (),
    ) -> None:
        self.videos, self.window, self.side, self.flip = list(videos), window, side, flip
        self.skipped = skipped
        self.fixed = not flip and window.start != "random"
        self.groups: Sequence[range] = (range(len(self.videos)),)
        self.frames: Sequence[int] = (window.frames,)
        self.rates: Sequence[float] = [window.rate(video.facts) for video in self.videos]
        self._kept: dict[int, list[Image]] = {}

    def __len__(self) -> int:
        return len(self.videos)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """A clip (frames, 3, side, side), cut and mirrored the same in every frame; raises
        ImageError if the file has become unreadable."""
        video = self.videos[index]
        starts = self.window.starts(video.facts, video.key)
        clip = self._tensor(index, starts[int(rng.integers(len(starts)))])
        if self.flip and rng.random() < 0.5 and not SIDED.search(video.caption):
            clip = clip.flip(-1)
        return Sample(clip, video.caption, video.key)

    def key(self, index: int) -> str:
        return self.videos[index].key

    def image(self, index: int) -> Tensor:
        video = self.videos[index]
        return self._tensor(index, self.window.starts(video.facts, video.key)[0])

    def crop(self, index: int) -> Crop:
        """See `Cropped`."""
        facts = self.videos[index].facts
        return central((facts.width, facts.height), (self.side, self.side))

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return self.videos[index].caption

    def fingerprint(self) -> str:
        """SHA-256 over the bytes of every video, the window, the side and `flip`."""
        done = ("video-1", self.window, self.side, self.flip)
        digest = hashlib.sha256(repr(done).encode())
        for video in self.videos:
            digest.update(video.identity().encode())
        return digest.hexdigest()

    def identity(self) -> dict[str, str]:
        return by_name(
            (video.key, captioned(digest_of(video.identity()), [video.caption]))
            for video in self.videos
        )

    def _tensor(self, index: int, start: int) -> Tensor:
        import torch

        from trainer.media.images import to_tensor

        return torch.stack([to_tensor(frame) for frame in self._cut(index, start)])

    def _cut(self, index: int, start: int) -> list[Image]:
        from trainer.media.images import resize_cover

        if index in self._kept:
            return self._kept[index]
        frames = self.videos[index].read(self.window, start)
        cut = [resize_cover(frame, self.side) for frame in frames]
        size = len(self.videos) * self.window.frames * self.side**2 * 3
        if self.window.start != "random" and size <= KEEP_BYTES:
            self._kept[index] = cut
        return cut

    def __getstate__(self) -> dict[str, Any]:
        # data workers get paths: sending them pixels would take longer than reading the files
        return {**self.__dict__, "_kept": {}}
