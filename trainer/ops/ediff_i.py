"""Paint with words: while sampling, words of the prompt attend to where they are painted.

    A = softmax((Q K^T + w M) / sqrt(d)),    w = w' log(1 + sigma) max(Q K^T)

eDiff-I, Balaji et al., arXiv 2211.01324, section 5 ("paint-with-words"). M (n, m) is 1 for the
image tokens of a region and the text tokens of its words, times a strength of the words. sigma is
the noise beside an image of its own scale, sigma / alpha. The maximum is over the heads and tokens
of one picture, so that a picture does not depend on those beside it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.attention.op import Traits
from trainer.attention.sites import require

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall
    from trainer.attention.hooks import Sampler

NAME = "ediff_i"
COND = "target/cond"
ALIKE = 0.01  # aspect ratios that differ by less are the same
MOST_NOISE = 80.0  # of sigma: a path that begins at noise alone has no largest one


class Painted:
    """The op, whose words are found when a sampling opens. regions: of each word or phrase, where
    it is painted, (H, W) in [0, 1]; strengths: of words that have another than 1; shaped: words
    whose regions have the shape of the picture, which the others cover whatever its shape."""

    name = NAME
    traits = Traits(owner=NAME, scores=True)

    def __init__(
        self,
        regions: Mapping[str, Tensor],
        strengths: Mapping[str, float],
        *,
        weight: float,
        shaped: Collection[str] = (),
    ) -> None:
        self.regions, self.strengths, self.weight = regions, strengths, weight
        self.shaped = tuple(shaped)
        self.places: list[dict[str, list[int]]] = []
        self.levels: list[float] = []
        self.known: dict[tuple[int, int, int], Tensor] = {}

    def read(self, sampler: Sampler) -> None:
        """Finds the words of every prompt, and the noise at every step.

        Raises:
            ValueError: no prompt has a word that is painted.
        """
        prompts = [sampler.read(prompt) for prompt in sampler.prompts]
        self.known = {}
        self.places = [
            {word: prompt.places(prompt.find(word)) for word in self.regions} for prompt in prompts
        ]
        for word in self.regions:
            if not any(places[word] for places in self.places):
                words = dict.fromkeys(own for prompt in prompts for own in prompt.words)
                raise ValueError(
                    f"methods.{NAME}: {word!r} is in no prompt; paint words of the prompt, which "
                    f"are {', '.join(words) or 'none'}"
                )
        self.levels = [_noise(*sampler.level(step)) for step in range(sampler.steps)]

    def scores(self, scores: Tensor, call: SiteCall) -> Tensor:
        """scores (b, h, n, m) with the words' added, for the rows that see the prompt."""
        rows = call.ctx.rows(COND)
        own = scores[rows]
        painted = self._painted(own, call)
        sigma = self.levels[min(call.ctx.step, len(self.levels) - 1)]
        largest = own.amax((1, 2, 3), keepdim=True)
        added = self.weight * math.log1p(sigma) * largest * painted.to(own)
        return torch.cat([scores[: rows.start], own + added, scores[rows.stop :]])

    def _painted(self, own: Tensor, call: SiteCall) -> Tensor:
        """M (b, 1, n, m) of the rows that see the prompt, the frames of a clip alike."""
        grid = call.grid(own.shape[2], NAME)
        key = (*grid, own.shape[3])
        if key not in self.known:
            self._check_shapes(call)
            small = {
                word: F.interpolate(region[None, None], grid, mode="area").flatten()
                for word, region in self.regions.items()
            }
            each = [
                _of_prompt(places, small, self.strengths, keys=key[2]) for places in self.places
            ]
            self.known[key] = torch.stack(each)[:, None]
        found = self.known[key].to(own.device)
        return found.repeat_interleave(len(own) // len(found), 0)

    def _check_shapes(self, call: SiteCall) -> None:
        """Raises ValueError for a region of another aspect ratio than the picture."""
        tall, wide = call.ctx.latent_size or (1, 1)
        for word in self.shaped:
            height, width = self.regions[word].shape
            if abs(width / height * tall / wide - 1) > ALIKE:
                raise ValueError(
                    f"methods.{NAME}: the mask of {word!r} has {width}x{height} pixels, and the "
                    f"picture is {wide / tall:.3g} times as wide as high; give a mask of its shape"
                )


class Painting:
    """What the hook of a sampling does: the op is installed while it is open."""

    def __init__(self, op: Painted, sites: str) -> None:
        self.op, self.sites = op, sites

    def open(self, sampler: Sampler) -> None:
        self.op.read(sampler)
        sampler.host.install(self.op, require(sampler.sites, self.sites, "sites"))

    def close(self, sampler: Sampler) -> None:
        if any(self.op in hosted.ops for hosted in sampler.host.processors.values()):
            sampler.host.remove(self.op)


def box_region(box: Sequence[float], side: int = 64) -> Tensor:
    """A region (side, side): 1 in a box of shares of width and height, left, top, right, bottom;
    pixels that it covers in part count in part."""
    left, top, right, bottom = (edge * side for edge in box)
    edges = torch.arange(side, dtype=torch.float32)

    def covered(low: float, high: float) -> Tensor:
        return ((edges + 1).clamp(max=high) - edges.clamp(min=low)).clamp(min=0)

    return covered(top, bottom)[:, None] * covered(left, right)[None]


def _of_prompt(
    places: Mapping[str, Sequence[int]],
    regions: Mapping[str, Tensor],
    strengths: Mapping[str, float],
    *,
    keys: int,
) -> Tensor:
    """M (n, m) of one prompt."""
    count = len(next(iter(regions.values())))
    found = torch.zeros(count, keys)
    for word, tokens in places.items():
        for token in tokens:
            found[:, token] += strengths.get(word, 1.0) * regions[word]
    return found


def _noise(alpha: float, sigma: float) -> float:
    return min(sigma / max(alpha, 1e-6), MOST_NOISE)
