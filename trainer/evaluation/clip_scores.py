"""What clips show, by the judge: which way the object goes, whether it is the one the caption asks
for, and how steady it stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np
import torch
from torch import Tensor

from trainer.data.source import Dataset
from trainer.data.world.clips import DIRECTIONS
from trainer.data.world.sprites import ALL
from trainer.evaluation.judge import Judge, clip_score

MOST = 0.75  # of the frames, 6 of 8, show the object, or it is not the clip's
SEEN = 1.0  # patches by which a frame shows it; real clips have 4 at least
STIRS = 0.04  # of a frame's side, and less is no motion; the slowest of the world goes 0.15
STEADY = 0.7  # correlation of place and time below which nothing goes one way


@dataclass(frozen=True)
class Tracks:
    """Where n clips show an object: centers (n, f, 2) as (x, y) in [0, 1], and by how many patches
    each frame does, mass (n, f)."""

    centers: Tensor
    mass: Tensor

    def moved(self) -> Tensor:
        """From the first frame to the last, along the straight line that fits best: (n, 2) in
        sides of a frame."""
        return self._line()[0] * (self.mass.shape[1] - 1)

    def directions(self) -> list[str | None]:
        """The words of the world for it, by where it goes farthest; None if it goes nowhere, to and
        fro, or is not there in `MOST` of the frames."""
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
        """Correlation (n,) of two clips' tracks, x and y as one: 1 for the same way at the same
        times, however long and wherever; 0 if one stands still or is not there."""
        both = Tracks(self.centers, self.mass.minimum(other.mass))
        weights = both._weights()
        one, two = (
            (weights.sqrt() * (centers - (weights * centers).sum(1, keepdim=True))).flatten(1)
            for centers in (self.centers, other.centers)
        )
        return torch.cosine_similarity(one, two) * both._there()

    def _there(self) -> Tensor:
        """(n,), 1 or 0"""
        seen = (self.mass >= SEEN).sum(1)
        return (seen >= ceil(MOST * self.mass.shape[1])).float()

    def _weights(self) -> Tensor:
        """(n, f, 1), alike for the frames that show it and 0 for the others; their sum is 1, or 0
        where none does."""
        seen = (self.mass >= SEEN).float()
        return (seen / seen.sum(1, keepdim=True).clamp(min=1))[..., None]

    def _line(self) -> tuple[Tensor, Tensor]:
        """Slope a frame and correlation with time, each (n, 2)."""
        weights = self._weights()
        frames = torch.arange(weights.shape[1], dtype=weights.dtype)[:, None].expand_as(weights)
        time = frames - (weights * frames).sum(1, keepdim=True)
        place = self.centers - (weights * self.centers).sum(1, keepdim=True)
        shared = (weights * time * place).sum(1)
        spread, apart = ((weights * x.square()).sum(1).clamp(min=1e-9) for x in (time, place))
        return shared / spread, shared / (spread * apart).sqrt()


def tracks(judge: Judge, clips: Tensor, words: Sequence[str]) -> Tracks:
    """Of the sprite that each clip (n, f, 3, H, W) is asked for; the judge must be the world's."""
    found = judge.found(clips.flatten(0, 1), ALL)
    frames = clips.shape[1]
    columns = torch.tensor([ALL.index(word) for word in words]).repeat_interleave(frames)
    rows = torch.arange(len(columns))
    centers, mass = found.centers[rows, columns], found.mass[rows, columns]
    return Tracks(centers.unflatten(0, (-1, frames)), mass.unflatten(0, (-1, frames)))


def named_right(judge: Judge, clips: Tensor, words: Sequence[str]) -> Tensor:
    """Whether each frame is named as its clip's sprite, of all there are: (n, f) bool."""
    frames = clips.shape[1]
    named = judge.named(clips.flatten(0, 1), ALL)
    right = [said == words[i // frames] for i, said in enumerate(named)]
    return torch.tensor(right).unflatten(0, (-1, frames))


def steadiness(judge: Judge, clips: Tensor) -> Tensor:
    """Frame consistency (n,): the mean cosine of the embeddings of neighbouring frames."""
    frames = judge.images(clips.flatten(0, 1)).unflatten(0, (-1, clips.shape[1]))
    return torch.stack([(a * b).sum(-1) for a, b in pairwise(frames.unbind(1))]).mean(0)


def asked(caption: str) -> tuple[str | None, str | None]:
    """The sprite that a caption names and the way it goes, each None unless it is one; with two
    sprites there is no saying which of them goes."""
    sprites = [word for word in caption.replace(",", " ").split() if word in ALL]
    ways = [way for way in DIRECTIONS if way in caption]
    if len(sprites) != 1:
        return None, None
    return sprites[0], ways[0] if len(ways) == 1 else None


class Footage:
    """Captions for clips, the real clips (n, f, 3, H, W) of the first of them, and what is right
    about others that are painted by these captions."""

    def __init__(self, judge: Judge, captions: Sequence[str], real: Tensor) -> None:
        self.judge, self.captions, self.real = judge, list(captions), real

    @classmethod
    def of(cls, judge: Judge, data: Dataset, count: int) -> Footage:
        """`count` captions of a dataset's clips, again from the first where it has fewer."""
        frames = max(data.frames)
        clips = data.groups[list(data.frames).index(frames)][:count]
        told = [data.caption(index, np.random.default_rng(0)) for index in clips]
        real = torch.stack([data.image(index) for index in clips])
        return cls(judge, [told[i % len(told)] for i in range(count)], real)

    def scores(self, clips: Tensor) -> dict[str, float | None]:
        """Of clips (n, f, 3, H, W) by the first n captions. direction right: share of those whose
        one sprite is to go one way that go this way; object right: of those with one sprite that
        show it in `MOST` of the frames; both None where no caption asks, or the judge does not
        know the world."""
        captions = self.captions[: len(clips)]
        scores: dict[str, float | None] = {"direction right": None, "object right": None}
        wanted = [asked(caption) for caption in captions]
        rows = [row for row, (word, _) in enumerate(wanted) if word is not None]
        if self.judge.names_patches and rows:
            words = [str(wanted[row][0]) for row in rows]
            shown = named_right(self.judge, clips[rows], words)
            enough = shown.sum(1) >= ceil(MOST * shown.shape[1])
            scores["object right"] = float(enough.float().mean())
            gone = tracks(self.judge, clips[rows], words).directions()
            right = [
                way == wanted[row][1]
                for row, way in zip(rows, gone, strict=True)
                if wanted[row][1] is not None
            ]
            scores["direction right"] = sum(right) / len(right) if right else None
        scores["frame consistency"] = float(steadiness(self.judge, clips).mean())
        each = [caption for caption in captions for _ in range(clips.shape[1])]
        scores["text alignment"] = clip_score(self.judge, clips.flatten(0, 1), each)
        return scores
