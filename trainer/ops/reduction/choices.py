"""What a layer of attention may do at a step of a sampler; imports no torch."""

from __future__ import annotations

from typing import Literal

# all of it; the rows with the prompt alone; near tokens and what the others added before; both;
# the output of the step before
Choice = Literal["full", "half", "window", "window_half", "reuse"]
HALVES: tuple[Choice, ...] = ("half", "window_half")
# the cheapest first, as the authors of DiTFastAttn try them
TRIED: tuple[Choice, ...] = ("reuse", "window_half", "window", "half")


def share_of_attention(choice: Choice, window: float) -> float:
    """Of the FLOP of q k^T and its product with v that a choice computes; window: of the tokens."""
    shares = {"full": 1.0, "half": 0.5, "window": window, "window_half": window / 2, "reuse": 0.0}
    return min(1.0, shares[choice])
