"""Writes pictures as PNG, and clips as MP4 and GIF, with what made them inside."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from importlib.util import find_spec
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from torch import Tensor

from trainer.media.images import to_pil
from trainer.media.made_by import FRAMES, comment, png_bytes, with_facts

PLAYED = 8.0  # frames a second of a written clip, by default
Facts = Mapping[str, Any]  # see `made_by`


def write_clip(
    pictures: Tensor, place: Path, fps: float, *, facts: Facts | None = None
) -> list[Path]:
    """Writes a picture (1, 3, H, W) or a clip (frames, 3, H, W) in [-1, 1] as `write_frames` does,
    and never over another, see `write_once`. Returns the files."""
    return write_once(_encoded([to_pil(picture) for picture in pictures], fps, facts), place)


def write_once(files: Mapping[str, bytes], place: Path) -> list[Path]:
    """Writes files as `<place><end>`, by their ends, and never over another: where there is one,
    the name is `<place>-2`, and so on. What is there already, byte for byte, is left. Returns the
    paths."""
    for number in count(1):
        name = place.name if number == 1 else f"{place.name}-{number}"
        found = {place.with_name(f"{name}{kind}"): data for kind, data in files.items()}
        if all(not path.exists() or path.read_bytes() == data for path, data in found.items()):
            break
    for path, data in found.items():
        path.write_bytes(data)
    return list(found)


def write_frames(
    images: Sequence[Image], place: Path, fps: float, *, facts: Facts | None = None
) -> list[Path]:
    """Writes one picture as `<place>.png`, or several of one size as `<place>.mp4`, if PyAV is
    installed, and `<place>.gif`, over what is there. Returns the files. Odd sides are kept, with a
    pixel format that fewer players can show."""
    found = []
    for kind, data in _encoded(images, fps, facts).items():
        found.append(path := place.with_name(f"{place.name}{kind}"))
        path.write_bytes(data)
    return found


def frames_digest(images: Sequence[Image]) -> str:
    """SHA-256 of the pixels and the size of frames, RGB."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()


def _encoded(images: Sequence[Image], fps: float, facts: Facts | None) -> dict[str, bytes]:
    """The file of a picture or the files of a clip, by the ends of their names. Facts of a clip get
    the hash of its frames, since an MP4 and a GIF show them changed."""
    if len(images) == 1:
        return {".png": png_bytes(with_facts(images[0], facts) if facts else images[0])}
    text = comment({**facts, FRAMES: frames_digest(images)}) if facts else ""
    shown = round(1000 / fps)  # milliseconds
    loop = BytesIO()
    options = {"comment": text.encode()} if text else {}
    images[0].save(
        loop, "GIF", save_all=True, append_images=images[1:], duration=shown, loop=0, **options
    )
    files = {".gif": loop.getvalue()}
    if find_spec("av") is None:
        return files
    even = "yuv420p" if all(side % 2 == 0 for side in images[0].size) else "yuv444p"
    frames = [np.asarray(image) for image in images]
    return {".mp4": encode_video(frames, fps, even, text=text)} | files


# crf: 0 is lossless; at 18 most people see no loss. With the other two, equal frames give equal
# bytes: by default, x264's choices depend on the number of threads and on the CPU.
OPTIONS = {"crf": "10", "threads": "1", "x264-params": "cpu-independent=1"}


def encode_video(
    frames: Sequence[np.ndarray] | np.ndarray,
    fps: float,
    pixels: str = "yuv444p",
    *,
    text: str = "",
) -> bytes:
    """An MP4 of frames uint8 (n, height, width, 3): the same frames give the same bytes.

    Args:
        pixels: the pixel format; some players can only show `yuv420p`, which needs even sides.
        text: the comment in the file.
    """
    import av

    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        if text:
            container.metadata["comment"] = text
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options=OPTIONS)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()
