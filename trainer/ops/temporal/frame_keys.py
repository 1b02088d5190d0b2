"""Self-attention in which a frame of a clip reads the keys and values of other frames, as if it
were one picture with them.

    o_i = softmax(q_i [k_a; k_b]^T / sqrt(d)) [v_a; v_b],    a, b: the frames that frame i reads

`FRAMES` has them by name. first and previous together are the sparse-causal attention of
Tune-A-Video (arXiv 2212.11565, equation 2), O(f n^2) for f frames of n tokens where attention
between all tokens of all frames is O(f^2 n^2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.attention.op import Traits, label

if TYPE_CHECKING:
    from trainer.attention.call import SiteCall

FRAMES: dict[str, Callable[[int], int]] = {
    "own": lambda i: i,
    "first": lambda i: 0,
    "previous": lambda i: max(i - 1, 0),
}


class FrameKeys:
    """An op of a self-attention site: frame i gets the keys and values of the frames `reads` names,
    one after another. A clip of one frame, an image, stays as it is to the bit.

    Its own name is that of the method it belongs to, since a site may have one of each method.
    """

    def __init__(self, reads: Sequence[str], owner: str) -> None:
        self.name, self.reads = owner, tuple(reads)
        self.traits = Traits(owner=owner, appends=len(self.reads) > 1, frames=True)

    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        frames = call.ctx.frames
        if frames == 1:
            return q, k, v
        if len(k) % frames:
            raise ValueError(
                f"{label(self)} sees clips of {frames} frames, and a batch of {len(k)} rows does "
                "not divide into them; give every frame of a clip a row"
            )
        return q, gathered(k, frames, self.reads), gathered(v, frames, self.reads)


def gathered(x: Tensor, frames: int, reads: Sequence[str]) -> Tensor:
    """x (b f, h, n, d) of each frame to (b f, h, n * len(reads), d) of those it reads."""
    clips = x.unflatten(0, (-1, frames))
    parts = [clips[:, frames_read(frames, name)] for name in reads]
    return torch.cat(parts, dim=3).flatten(0, 1)


def frames_read(frames: int, name: str) -> list[int]:
    """The frame that each of `frames` frames reads."""
    return [FRAMES[name](i) for i in range(frames)]
