"""Writes pictures as PNG, and clips as MP4 and GIF."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL.Image import Image
from torch import Tensor

from trainer.media.images import to_pil

PLAYED = 8.0  # frames a second of a written clip, by default


def write_clip(pictures: Tensor, place: Path, fps: float) -> list[Path]:
    """Writes one picture (1, 3, H, W) in [-1, 1] as `<place>.png`, or a clip (frames, 3, H, W) as
    `write_frames` does. Returns the files."""
    images = [to_pil(picture) for picture in pictures]
    if len(images) == 1:
        images[0].save(path := place.with_name(f"{place.name}.png"))
        return [path]
    return write_frames(images, place, fps)


def write_frames(images: Sequence[Image], place: Path, fps: float) -> list[Path]:
    """Writes pictures of one size as `<place>.mp4`, if PyAV is installed, and `<place>.gif`.
    Returns the files. Odd sides are kept, with a pixel format that fewer players can show."""
    video, loop = (place.with_name(f"{place.name}.{kind}") for kind in ("mp4", "gif"))
    shown = round(1000 / fps)  # milliseconds
    images[0].save(loop, save_all=True, append_images=images[1:], duration=shown, loop=0)
    if find_spec("av") is None:
        return [loop]
    even = "yuv420p" if all(side % 2 == 0 for side in images[0].size) else "yuv444p"
    video.write_bytes(encode_video([np.asarray(image) for image in images], fps, even))
    return [video, loop]


# crf: 0 is lossless; at 18 most people see no loss. With the other two, equal frames give equal
# bytes: by default, x264's choices depend on the number of threads and on the CPU.
OPTIONS = {"crf": "10", "threads": "1", "x264-params": "cpu-independent=1"}


def encode_video(
    frames: Sequence[np.ndarray] | np.ndarray, fps: float, pixels: str = "yuv444p"
) -> bytes:
    """An MP4 of frames uint8 (n, height, width, 3): the same frames give the same bytes.

    Args:
        pixels: the pixel format; some players can only show `yuv420p`, which needs even sides.
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
