"""The latents of a user's video or picture, as sampling and inversion take them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.data.video_clips import CaptionedVideo, VideoClips, Window
from trainer.media.read_video import examine

if TYPE_CHECKING:
    from trainer.backbones.backbone import Backbone


def source_pixels(
    backbone: Backbone,
    path: Path,
    *,
    frames: int,
    fps: float | None,
    data: Mapping[str, Any],
    side: int | None = None,
) -> Tensor:
    """A clip of `frames` frames (frames, 3, side, side) in [-1, 1], cut from a video as the data
    source `video` cuts it.

    data: the section `data` of the recipe that trained the model; its stride, fps and start hold
    where `fps` is None. side: of the frames in pixels, None for the backbone's.

    Raises:
        ImageError: the video cannot be read, or is too short.
        ValueError: the backbone takes no clips of so many frames.
    """
    backbone.clip_frames.check(frames)
    own = dict(data) if data.get("source") == "video" and fps is None else {}
    start = own.get("start", 0)
    window = Window(
        frames=frames,
        stride=own.get("stride", 1),
        fps=own.get("fps", fps),
        start=start if start != "random" else 0,
    )
    path = path.expanduser()
    video = CaptionedVideo(path.name, "", facts=examine(path, path.name), source=path)
    return VideoClips([video], window, side=side or backbone.resolution, flip=False).image(0)


def source_latents(
    backbone: Backbone,
    path: Path,
    *,
    frames: int,
    fps: float | None,
    data: Mapping[str, Any],
    side: int | None = None,
) -> Tensor:
    """The latents (f, c, h, w) of `source_pixels`, which has these arguments: the mean of the VAE's
    posterior. f is `frames`, or less where the VAE compresses time."""
    pixels = source_pixels(backbone, path, frames=frames, fps=fps, data=data, side=side)
    return mean_latents(backbone, pixels)


def mean_latents(backbone: Backbone, clip: Tensor) -> Tensor:
    """The mean of the VAE's posterior, (f, c, h, w), for a clip (frames, 3, H, W) in [-1, 1]."""
    moments = backbone.moments(clip.to(backbone.device), len(clip))
    return backbone.latents(moments, torch.zeros_like(moments.chunk(2, 1)[0]))
