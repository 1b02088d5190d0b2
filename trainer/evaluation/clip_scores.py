"""Scores of clips by the judge: which way the object moves, whether it is the object of the
caption, and how consistent the frames are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import ceil

import numpy as np
import torch
from torch import Tensor

from trainer.data.extra_inputs import extra_inputs
from trainer.data.source import Dataset
from trainer.data.world.clips import DIRECTIONS
from trainer.data.world.sprites import ALL
from trainer.evaluation.feature_scores import text_alignment
from trainer.evaluation.judge import Judge
from trainer.evaluation.shares import share

MOST = 0.75  # the share of frames that must show the object: 6 of 8
SEEN = 1.0  # patches of the object from which on a frame shows it; real clips have 4 at least
STIRS = 0.04  # of a frame's side: less is no motion; the world's slowest clips move by 0.15
STEADY = 0.7  # correlation of position and time below which a motion has no direction


@dataclass(frozen=True)
class Tracks:
    """Where n clips of f frames show an object.

    centers (n, f, 2): its centre as (x, y) in [0, 1]; mass (n, f): how many patches show it.
    """

    centers: Tensor
    mass: Tensor

    def moved(self) -> Tensor:
        """The motion (n, 2) from the first frame to the last along the best-fitting straight line,
        in sides of a frame."""
        return self._line()[0] * (self.mass.shape[1] - 1)

    def directions(self) -> list[str | None]:
        """The direction in which each object moves farthest, as the world's captions name it; None
        if it stays, moves to and fro, or is missing from too many frames (`MOST`)."""
        steps = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)
        ways = self.moved() @ steps.T
        goes = (ways > STIRS) & (self._line()[1] @ steps.T > STEADY)
        far, way = (ways * goes * self._there()[:, None]).max(1)
        words = list(DIRECTIONS)
        return [
            words[i] if length else None
            for i, length in zip(way.tolist(), far.tolist(), strict=True)
        ]

    def like(self, other: Tracks) -> Tensor:
        """Correlation (n,) of two tracks over x and y together: 1 for the same motion at the same
        times, whatever its length and position; 0 if an object stands still or is missing."""
        both = Tracks(self.centers, self.mass.minimum(other.mass))
        weights = both._weights()
        one, two = (
            (weights.sqrt() * (centers - (weights * centers).sum(1, keepdim=True))).flatten(1)
            for centers in (self.centers, other.centers)
        )
        return torch.cosine_similarity(one, two) * both._there()

    def _there(self) -> Tensor:
        """1 for each clip that shows its object in enough frames, else 0: (n,)."""
        seen = (self.mass >= SEEN).sum(1)
        return (seen >= ceil(MOST * self.mass.shape[1])).float()

    def _weights(self) -> Tensor:
        """Weights (n, f, 1) of the frames: equal for those that show the object and 0 for the
        others; they add up to 1, or to 0 where no frame shows it."""
        seen = (self.mass >= SEEN).float()
        return (seen / seen.sum(1, keepdim=True).clamp(min=1))[..., None]

    def _line(self) -> tuple[Tensor, Tensor]:
        """Slope for each frame, and correlation of position with time, each (n, 2)."""
        weights = self._weights()
        frames = torch.arange(weights.shape[1], dtype=weights.dtype)[:, None].expand_as(weights)
        time = frames - (weights * frames).sum(1, keepdim=True)
        position = self.centers - (weights * self.centers).sum(1, keepdim=True)
        covariance = (weights * time * position).sum(1)
        time_variance, position_variance = (
            (weights * x.square()).sum(1).clamp(min=1e-9) for x in (time, position)
        )
        slope = covariance / time_variance
        return slope, covariance / (time_variance * position_variance).sqrt()


def tracks(judge: Judge, clips: Tensor, words: Sequence[str]) -> Tracks:
    """The tracks of the sprite `words[i]` in clip i of (n, f, 3, H, W).

    Raises:
        ValueError: the judge is not the world's, which alone names patches.
    """
    found = judge.found(clips.flatten(0, 1), ALL)
    frames = clips.shape[1]
    columns = torch.tensor([ALL.index(word) for word in words]).repeat_interleave(frames)
    rows = torch.arange(len(columns))
    centers, mass = found.centers[rows, columns], found.mass[rows, columns]
    return Tracks(centers.unflatten(0, (-1, frames)), mass.unflatten(0, (-1, frames)))


def named_right(judge: Judge, clips: Tensor, words: Sequence[str]) -> Tensor:
    """Whether the judge, choosing among all sprites, names each frame as its clip's: (n, f)."""
    frames = clips.shape[1]
    names = judge.named(clips.flatten(0, 1), ALL)
    right = [name == words[i // frames] for i, name in enumerate(names)]
    return torch.tensor(right).unflatten(0, (-1, frames))


def steadiness(frames: Tensor) -> Tensor:
    """Frame consistency (n,): the mean cosine of neighbouring frames' embeddings (n, f, d), which
    are of unit length."""
    return torch.stack([(a * b).sum(-1) for a, b in pairwise(frames.unbind(1))]).mean(0)


def asked(caption: str) -> tuple[str | None, str | None]:
    """The sprite that a caption names and the direction it moves in; each is None unless there is
    exactly one. With two sprites it is open which of them moves, so both are None."""
    sprites = [word for word in caption.replace(",", " ").split() if word in ALL]
    ways = [way for way in DIRECTIONS if way in caption]
    if len(sprites) != 1:
        return None, None
    return sprites[0], ways[0] if len(ways) == 1 else None


class ClipScores:
    """Scores clips that were generated for `captions`.

    real: the clips (n, f, 3, H, W) that the first n captions describe; read: gives further inputs
    of these clips by name, each (n, ...), for models that read some.
    """

    def __init__(
        self,
        judge: Judge,
        captions: Sequence[str],
        real: Tensor,
        read: Callable[[Sequence[str]], dict[str, Tensor]] = lambda names: {},
    ) -> None:
        self.judge, self.captions, self.real = judge, list(captions), real
        self.read = read

    def inputs(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Further inputs of the clip of each caption, by name, each (captions, ...)."""
        rows = [i % len(self.real) for i in range(len(self.captions))]
        return {name: value[rows] for name, value in self.read(names).items()}

    @classmethod
    def of(cls, judge: Judge, data: Dataset, count: int) -> ClipScores:
        """For `count` captions of a dataset's clips; they repeat where it has fewer."""
        frames = max(data.frames)
        clips = data.groups[list(data.frames).index(frames)][:count]
        captions = [data.caption(index, np.random.default_rng(0)) for index in clips]
        real = torch.stack([data.image(index) for index in clips])
        read = partial(extra_inputs, data, clips)
        return cls(judge, [captions[i % len(captions)] for i in range(count)], real=real, read=read)

    def scores(self, clips: Tensor) -> dict[str, float | None]:
        """The scores of clips (n, f, 3, H, W) that were generated for the first n captions.

        object right: among clips whose caption names one sprite, the share that show it in `MOST`
        of the frames. direction right: among those whose caption also gives one direction, the
        share that move in it. Both are None where no caption qualifies or the judge is not the
        world's. frame consistency: see `steadiness`. CLIP-T: see `text_alignment`, over all frames.
        """
        captions = self.captions[: len(clips)]
        scores: dict[str, float | None] = {"direction right": None, "object right": None}
        wanted = [asked(caption) for caption in captions]
        rows = [row for row, (word, _) in enumerate(wanted) if word is not None]
        if self.judge.names_patches and rows:
            words = [str(wanted[row][0]) for row in rows]
            shown = named_right(self.judge, clips[rows], words)
            enough = shown.sum(1) >= ceil(MOST * shown.shape[1])
            scores["object right"] = share(enough.tolist())
            gone = tracks(self.judge, clips[rows], words).directions()
            right = [
                way == wanted[row][1]
                for row, way in zip(rows, gone, strict=True)
                if wanted[row][1] is not None
            ]
            scores["direction right"] = share(right) if right else None
        seen, frames = self.judge.images(clips.flatten(0, 1)), clips.shape[1]
        scores["frame consistency"] = float(steadiness(seen.unflatten(0, (-1, frames))).mean())
        texts = self.judge.texts(captions).repeat_interleave(frames, 0)
        scores["CLIP-T"] = text_alignment(seen, texts)
        return scores
