"""Options that several data sources have, each with its description."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.media.photo_captions import CaptionKind

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
    Literal["known", "held_out", "all", "wide", "wide_held_out"],
    Field(
        description="which sprites: the 64 the tiny backbones were trained on, the 16 they were "
        "not, or all 80; wide: 384 for a backbone that is trained on them, which does not ship; "
        "wide_held_out: 32 others, kept out of its training"
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
Recursive = Annotated[
    bool,
    Field(
        description="read photos of subfolders as well; without it, only those of folders like "
        "10_dog, where the folder itself holds none"
    ),
]
CaptionLines = Annotated[
    bool,
    Field(
        description="each line of a .txt or .caption is a caption of its own, one of which is "
        "drawn at each use; without it the whole file is one caption"
    ),
]
CaptionFrom = Annotated[
    CaptionKind | None,
    Field(
        description="read captions only from .txt or .caption files, from metadata.jsonl, or from "
        "the names of folders like 10_dog; null takes whichever there is"
    ),
]
ShuffleTags = Annotated[
    bool,
    Field(
        description="put the tags of a caption, its parts between commas, into another order at "
        "each use"
    ),
]
KeepTags = Annotated[
    int, Field(ge=0, description="with shuffle_tags: tags at the front that stay where they are")
]


def idle_tags(shuffle: bool) -> dict[str, str]:
    """Options of tags that have no effect."""
    return {} if shuffle else {"keep_tags": "data.shuffle_tags=false leaves tags in their order"}
