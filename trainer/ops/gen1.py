"""Gen-1's structure as input channels: depth made coarser, and how coarse it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from trainer.attention.input_channels import ChannelInputs
from trainer.data.depth import DEPTH

LEVEL = "structure_level"  # an input, as `DEPTH` is
WAVES = 4  # channels that tell the level


def structure_channels(given: ChannelInputs, most: int) -> Tensor | None:
    """The depth `inputs["depth"]`, (b, f, 1, H, W), made `level` times half as fine, and sines and
    cosines of the level, constant over a frame: (b f, 1 + WAVES, h, w). None without depth.

    most: the coarsest level, as of `Gen1.structure`. In training a level from 0 to `most` is drawn
    for each clip; in sampling it is that of `inputs["structure_level"]`, (b,), or 0.

    Raises:
        ValueError: a level that was not trained.
    """
    depth = given.inputs.get(DEPTH)
    if depth is None:
        return None
    height, width = given.shape[2:]
    levels = _levels(given, most)
    maps = F.interpolate(depth.flatten(0, 1).float(), (height, width), mode="area")
    clips = maps.unflatten(0, (-1, given.frames))
    coarse = [halved(own, level) for own, level in zip(clips, levels, strict=True)]
    told = torch.tensor(levels, dtype=torch.float32, device=depth.device)
    waves = get_timestep_embedding(told, WAVES, downscale_freq_shift=0)[:, None, :, None, None]
    waves = waves.expand(-1, given.frames, -1, height, width)
    return torch.cat([torch.stack(coarse), waves], 2).flatten(0, 1)


def _levels(given: ChannelInputs, most: int) -> list[int]:
    """How coarse the structure of each clip is to be."""
    wanted = given.inputs.get(LEVEL)
    if wanted is not None:
        levels = [int(level) for level in wanted.tolist()]
        if min(levels) < 0 or max(levels) > most:
            raise ValueError(
                f"{LEVEL}={max(levels, key=abs)}: this model has learned levels from 0, as fine as "
                f"its latents, to {most}"
            )
        return levels
    return [0 if given.sampling else seed % (most + 1) for seed in given.seeds]


def halved(x: Tensor, times: int) -> Tensor:
    """x (b, c, h, w) made 2 ** times smaller, to a pixel at least, and as large as it was again."""
    if not times:
        return x
    height, width = (max(1, side >> times) for side in x.shape[-2:])
    small = F.adaptive_avg_pool2d(x, (height, width))
    return F.interpolate(small, x.shape[-2:], mode="bilinear", align_corners=False)
