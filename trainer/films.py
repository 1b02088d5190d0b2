"""Clips in and out of sampling: a video as latents, pictures as files that play."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from trainer.data.decode import examine
from trainer.data.images import to_pil
from trainer.data.takes import Clips, Take, Window

if TYPE_CHECKING:
    from trainer.backbones.base import Backbone

PLAYED = 8.0  # frames a second of a clip that is written, where nobody says


def source_latents(
    backbone: Backbone, path: Path, frames: int, fps: float | None, data: Mapping[str, Any]
) -> Tensor:
    """The latents (frames, c, h, w) of a video's clip, cut as the source `video` cuts it, without
    noise of the posterior. data: of the recipe a model was trained by, for stride, fps and start
    where `fps` is None.

    Raises:
        ImageError: the video cannot be read, or is too short.
    """
    own = dict(data) if data.get("source") == "video" and fps is None else {}
    start = own.get("start", 0)
    window = Window(
        frames, own.get("stride", 1), own.get("fps", fps), start if start != "random" else 0
    )
    path = path.expanduser()
    take = Take(path.name, "", examine(path, path.name), path)
    pixels = Clips([take], window, backbone.resolution, False, ()).image(0)
    device = next(backbone.vae.parameters()).device
    moments = backbone.moments(pixels.to(device))
    return backbone.latents(moments, torch.zeros_like(moments.chunk(2, 1)[0]))


def write(pictures: Tensor, place: Path, fps: float) -> list[Path]:
    """One picture (1, 3, H, W) in [-1, 1] as `<place>.png`; a clip (frames, 3, H, W) as `play`
    writes it."""
    images = [to_pil(picture) for picture in pictures]
    if len(images) == 1:
        images[0].save(path := place.with_name(f"{place.name}.png"))
        return [path]
    return play(images, place, fps)


def play(images: Sequence[Image], place: Path, fps: float) -> list[Path]:
    """Pictures of one size as `<place>.mp4`, where PyAV is installed, and `<place>.gif`. Sides that
    are not even are kept, by a format of colours that fewer players know."""
    film, loop = (place.with_name(f"{place.name}.{kind}") for kind in ("mp4", "gif"))
    shown = round(1000 / fps)  # milliseconds
    images[0].save(loop, save_all=True, append_images=images[1:], duration=shown, loop=0)
    if find_spec("av") is None:
        return [loop]
    from trainer.data.write_clips import encode

    even = "yuv420p" if all(side % 2 == 0 for side in images[0].size) else "yuv444p"
    film.write_bytes(encode([np.asarray(image) for image in images], fps, even))
    return [film, loop]
