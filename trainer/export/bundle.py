"""What an adapter adds to a stock model, in the terms that all formats share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LowRankDelta:
    """LoRA, dW = scale * up down; down (r, in) or (r, in, kh, kw), up (out, r) or (out, r, 1, 1)
    (arXiv 2106.09685, equation 3)."""

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.down)


@dataclass(frozen=True)
class DoRADelta:
    """DoRA, W' = magnitude * V / |V| for each row, where V = W + scale * up down; magnitude (out,),
    or (1, out, 1, 1) of a convolution (arXiv 2402.09353, equation 5)."""

    down: Tensor
    up: Tensor
    magnitude: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.down)


@dataclass(frozen=True)
class FullDelta:
    """dW and db of a layer as they are; None is no change."""

    weight: Tensor | None
    bias: Tensor | None = None


Delta = LowRankDelta | DoRADelta | FullDelta


@dataclass(frozen=True)
class Form:
    """A dW as LoHa or LoKr makes it, with LyCORIS' names of its tensors, such as `hada_w1_a`.

    type: `loha`, dW = scale * (w1_a w1_b) * (w2_a w2_b) (arXiv 2108.06098), or `lokr`, dW = scale *
    w1 (x) w2 (arXiv 2309.14859), where w1 and w2 may be products of two matrices, and the cores t1,
    t2 hold the kernel of a convolution.
    """

    type: str
    tensors: Mapping[str, Tensor]
    scale: float = 1.0


@dataclass(frozen=True)
class Bundle:
    """What an adapter adds to a stock model.

    layers: by module path, as in `unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k`;
    tokens: the row (d,) of each new word, for each text encoder; known: the same for words of the
    vocabulary whose embeddings were trained; forms: by module path, how LoHa and LoKr make the
    full delta that `layers` has there; bare: the changes of parameters that belong to no layer, by
    their names; dropped: the adapter's tensors that are none of these, which
    must not matter to the output; notes: what a user should know about a file that was read.
    """

    layers: Mapping[str, Delta]
    tokens: Mapping[str, Mapping[str, Tensor]]
    known: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    forms: Mapping[str, Form] = field(default_factory=dict)
    bare: Mapping[str, Tensor] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __or__(self, other: Bundle) -> Bundle:
        """Both together; they hold different layers and words."""
        return Bundle(
            {**self.layers, **other.layers},
            {**self.tokens, **other.tokens},
            known={**self.known, **other.known},
            forms={**self.forms, **other.forms},
            bare={**self.bare, **other.bare},
            dropped=self.dropped + other.dropped,
            notes=self.notes + other.notes,
        )
