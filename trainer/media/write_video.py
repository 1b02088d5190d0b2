"""Clips in and out of sampling: a video as latents, pictures as files that play."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL.Image import Image
from torch import Tensor

from trainer.media.images import to_pil

if TYPE_CHECKING:
    pass


PLAYED = 8.0  # frames a second of a clip that is written, where nobody says


def write_clip(pictures: Tensor, place: Path, fps: float) -> list[Path]:
    """One picture (1, 3, H, W) in [-1, 1] as `<place>.png`; a clip (frames, 3, H, W) as `play`
    writes it."""
    images = [to_pil(picture) for picture in pictures]
    if len(images) == 1:
        images[0].save(path := place.with_name(f"{place.name}.png"))
        return [path]
    return write_frames(images, place, fps)


def write_frames(images: Sequence[Image], place: Path, fps: float) -> list[Path]:
    """Pictures of one size as `<place>.mp4`, where PyAV is installed, and `<place>.gif`. Sides that
    are not even are kept, by a format of colours that fewer players know."""
    film, loop = (place.with_name(f"{place.name}.{kind}") for kind in ("mp4", "gif"))
    shown = round(1000 / fps)  # milliseconds
    images[0].save(loop, save_all=True, append_images=images[1:], duration=shown, loop=0)
    if find_spec("av") is None:
        return [loop]
    pass

    even = "yuv420p" if all(side % 2 == 0 for side in images[0].size) else "yuv444p"
    film.write_bytes(encode_video([np.asarray(image) for image in images], fps, even))
    return [film, loop]


# crf: 0 is lossless, at 18 most people see no loss. The others make the bytes a function of the
# frames alone: x264 chooses otherwise by the number of threads, and now and then by the CPU.
OPTIONS = {"crf": "10", "threads": "1", "x264-params": "cpu-independent=1"}


def encode_video(
    frames: Sequence[np.ndarray] | np.ndarray, fps: float, pixels: str = "yuv444p"
) -> bytes:
    """An MP4 of frames uint8 (n, height, width, 3): the same frames give the same bytes.

    Args:
        pixels: `yuv420p`, with even sides, for players that know no other.
    """
    import av

    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options=OPTIONS)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()
