"""Background smoothing of Text2Video-Zero: outside of the object, what a frame begins from is drawn
to what the first frame shows there, moved.

    x_k <- (1 - B) x_k + B (alpha W_k(x_1) + (1 - alpha) x_k),    B = (1 - M_k) (1 - W_k(M_1))

Khachatryan et al., arXiv 2303.13439, section 3.3.3; W_k is the translation of frame k, M_k a mask
of the object in it. The paper's equation has M_k alone; as in its released code, the background is
also outside of the moved object of the first frame, which would else be mixed into it. The paper
masks with a network for salient objects; here the mask comes from cross-attention to the words that
name the object, as in Prompt-to-Prompt (arXiv 2208.01626, section 4): no other network is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from trainer.ops.attention_maps import MapStore

if TYPE_CHECKING:
    from trainer.attention.hooks import Sampler
    from trainer.attention.host import Host
    from trainer.attention.sites import Site

Moved = Callable[[Tensor], Tensor]  # (b, c, h, w) of the first frames to (b, f, c, h, w)
GROUP = "target/cond"  # the rows that read the prompt
REACH = 2 / 64  # how far a mask is widened, of the side of the latents, as in the released code


@dataclass(frozen=True)
class Background:
    """words: those that name the object; strength: alpha; threshold: of the largest value of a
    frame's map, from which on the object is there; sites: whose maps are read; owner: the method,
    for messages."""

    words: Sequence[str]
    strength: float
    threshold: float
    host: Host
    sites: Sequence[Site]
    owner: str

    def smoothed(self, clips: Tensor, sampler: Sampler, step: int, *, moved: Moved) -> Tensor:
        """Latents (b, f, c, h, w) before a step, smoothed."""
        mask = self.object_in(clips, sampler, step)
        return smoothed(clips, mask, self.strength, moved=moved)

    def object_in(self, clips: Tensor, sampler: Sampler, step: int) -> Tensor:
        """Where the object is (b, f, 1, h, w), 1 inside it and else 0, by the attention maps of
        sampling these latents (b, f, c, h, w) from a step to the end."""
        frames = clips.shape[1]
        rows = [where for where in self._places(sampler) for _ in range(frames)]
        store = MapStore(rows, group=GROUP)
        self.host.install(store, self.sites)
        try:
            sampler(clips.flatten(0, 1), step, sampler.steps)
        finally:
            self.host.remove(store)
        height, width = clips.shape[-2:]
        maps = store.average((height, width)).mean(1, keepdim=True).to(clips)
        return masked(maps, self.threshold).unflatten(0, (-1, frames))

    def _places(self, sampler: Sampler) -> list[list[int]]:
        """The positions of the words in the prompt of each clip, the first of each word."""
        every = [sampler.places(word) for word in self.words]
        for word, places in zip(self.words, every, strict=True):
            if not all(places):
                raise ValueError(
                    f"methods.{self.owner}.object={' '.join(self.words)}: {word} is not in the "
                    "prompt, or is not read as a word of its own; name the object as the prompt "
                    "does"
                )
        return [[own[0] for own in clip] for clip in zip(*every, strict=True)]


def masked(maps: Tensor, threshold: float) -> Tensor:
    """Masks (n, 1, h, w) of maps (n, 1, h, w): 1 from a share of their largest value on, widened by
    `REACH` to all sides."""
    reach = max(1, round(REACH * min(maps.shape[-2:])))
    inside = (maps >= threshold * maps.amax((2, 3), keepdim=True)).to(maps.dtype)
    return F.max_pool2d(inside, 2 * reach + 1, stride=1, padding=reach)


def smoothed(clips: Tensor, mask: Tensor, strength: float, *, moved: Moved) -> Tensor:
    """The equation above: clips (b, f, c, h, w), mask (b, f, 1, h, w), strength alpha."""
    first, first_mask = moved(clips[:, 0]), moved(mask[:, 0])
    free = (1 - mask) * (1 - first_mask)
    return clips + strength * free * (first - clips)
