"""Options that several data sources have, each with its description."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

OnBad = Annotated[
    Literal["raise", "skip"],
    Field(
        description="what samples that are damaged or incomplete do: end the run with all of them "
        "named, or are left out and named"
    ),
]
Buckets = Annotated[
    int,
    Field(
        ge=0,
        description="cut pictures to aspect-ratio buckets whose sides are multiples of so many "
        "pixels, 0 for squares; latents of more than one size are not cached",
    ),
]
Sprites = Annotated[
    Literal["known", "held_out", "all"],
    Field(
        description="which sprites: the 64 the tiny backbones were trained on, the 16 they were "
        "not, or all 80"
    ),
]
WorldSeed = Annotated[int, Field(ge=0, description="another seed gives other scenes and clips")]
Mirror = Annotated[
    bool,
    Field(
        description="mirror pictures every second time; latents then cannot be cached, and "
        "captions that say left or right become wrong"
    ),
]
