"""Writes clips of the embedded world as shards of MP4, with what is known of every frame:

    clip-<seed>-<index>.mp4    the frames
    clip-<seed>-<index>.txt    the caption
    clip-<seed>-<index>.json   background, crossing, fps, and from back to front the word, motion
                               and speed of each object with its box in every frame

H.264 at a quality near lossless and with colour at full resolution: the usual 4:2:0 halves it,
which at 64x64 blurs the colours of a sprite into the background. Masks are not stored;
`trainer.data.clips.draw` paints them again from seed and index.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import numpy as np

from trainer.data.clips import Clip, draw
from trainer.data.manifest import VIDEO
from trainer.data.write_shards import SPRITES, Record, write

# crf: 0 is lossless, at 18 most people see no loss. The others make the bytes a function of the
# frames alone: x264 chooses otherwise by the number of threads, and now and then by the CPU.
OPTIONS = {"crf": "10", "threads": "1", "x264-params": "cpu-independent=1"}


def write_clips(
    folder: str | Path,
    count: int,
    seed: int = 0,
    sprites: str = "known",
    frames: int = 8,
    fps: float | None = None,
    per_shard: int = 1000,
) -> list[Path]:
    """Writes clips 0..count-1 of a seed as `clips-000000.tar`, ...; returns the shards.

    Raises:
        ValueError: see `write_shards.write` and `clips.paint`; no such set of sprites; a count
            below 1.
    """
    if sprites not in SPRITES:
        raise ValueError(f"sprites={sprites}: choose one of {', '.join(SPRITES)}")
    if count < 1:
        raise ValueError(f"count={count}: write at least one clip")
    names = SPRITES[sprites]
    records = (record(draw(seed, i, names, frames, fps), f"clip-{seed}-{i}") for i in range(count))
    return write(folder, records, per_shard, "clips")


def record(clip: Clip, key: str) -> Record:
    """The members of one clip."""
    tracks = clip.plot.tracks
    known = {
        "background": clip.plot.background,
        "crossing": clip.plot.crossing,
        "fps": clip.fps,
        "words": [track.word for track in tracks],
        "motions": [track.motion for track in tracks],
        "speeds": [track.speed for track in tracks],
        "boxes": [[placed.box for placed in boxes] for boxes in zip(*clip.objects, strict=True)],
    }
    return key, {
        VIDEO: encode(clip.frames, clip.fps),
        "txt": clip.caption.encode(),
        "json": json.dumps(known).encode(),
    }


def encode(frames: Sequence[np.ndarray] | np.ndarray, fps: float, pixels: str = "yuv444p") -> bytes:
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
