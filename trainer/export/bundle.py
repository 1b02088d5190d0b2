"""Forms: how an adapter is written for other tools, and read from them. One file each, found by its
name.

A form's file has `write(job, folder, dtype)`, a table `READERS` of the loaders that must read the
files back (`(folder, base) -> model`, or None where a tool has no loader for this kind of network),
and where other tools write it too `read(path, base)`. A form that has a place for what methods
insert into a denoiser says for which by `carries(model)`, and one whose readers are known to differ
says by how much in `remark(model, probe, answer)`; `relearns` is True in one that carries known
words which have learned anew. Between an adapter and a form stands a `Bundle`. Files that begin
with `_` are no forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LowRankDelta:
    """dW = scale * up down. down (r, in) or (r, in, kh, kw), up (out, r) or (out, r, 1, 1)."""

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.down)


@dataclass(frozen=True)
class DoRADelta:
    """W' = magnitude * V / |V| by row, V = W + scale * up down; magnitude (out,), or (1, out, 1, 1)
    of a convolution."""

    down: Tensor
    up: Tensor
    magnitude: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.down)


@dataclass(frozen=True)
class FullDelta:
    """The whole dW and db of a layer; None is no change."""

    weight: Tensor | None
    bias: Tensor | None = None


Delta = LowRankDelta | DoRADelta | FullDelta


@dataclass(frozen=True)
class Bundle:
    """What an adapter adds to a stock model.

    layers: by module path, as in `unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k`.
    tokens: each new word's row (d,) for each text encoder. known: the same of words that the
    vocabulary had and that have learned anew. dropped: stored tensors that are neither; they must
    not matter to the output. notes: what a user should hear about a file.
    """

    layers: Mapping[str, Delta]
    tokens: Mapping[str, Mapping[str, Tensor]]
    known: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)
