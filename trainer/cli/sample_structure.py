"""`sample structure=clip.mp4 structure_level=2`: what models with input channels for the structure
of a clip are told of one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.backbones.backbone import Backbone
    from trainer.diffusion.sampling_settings import Sampling


GREY = "it is grey, and read as depth, bright is near"
GUESSED = (
    "depth is guessed, what differs from the background is near; give a grey clip for depth that "
    "you have"
)


def structure_of(
    backbone: Backbone,
    path: Path | None,
    level: int,
    *,
    settings: Sampling,
    data: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The inputs of one clip that its structure is made of: its depth, and how much coarser that is
    made. path: the clip, None for none. data: the section of the recipe that trained the model.

    Raises:
        ValueError: a model that reads no structure.
    """
    import torch

    from trainer.attention.input_channels import inputs_read
    from trainer.cli.sample_source import square_side
    from trainer.data.depth import DEPTH, depth_like, is_grey
    from trainer.diffusion.source_clip import source_pixels
    from trainer.ops.gen1 import LEVEL

    if path is None:
        return {}
    if DEPTH not in inputs_read(backbone):
        raise ValueError(
            f"structure={path}: this model reads no structure; give an adapter that was trained "
            "with a method that does, as recipe=gen1, or the clip as source="
        )
    frames = source_pixels(
        backbone,
        path,
        frames=settings.frames,
        fps=settings.fps,
        data=data,
        side=square_side(settings, "structure"),
    )
    print(f"structure={path.name}: {GREY if is_grey(frames) else GUESSED}", file=sys.stderr)
    return {DEPTH: depth_like(frames)[None], LEVEL: torch.tensor([level])}
