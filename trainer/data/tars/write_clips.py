"""Writes clips of the embedded world as shards of MP4, with the truth about every frame:

    clip-<seed>-<index>.mp4    the frames
    clip-<seed>-<index>.txt    the caption
    clip-<seed>-<index>.json   background, crossing, fps, and from back to front the word, motion
                               and speed of each object with its box in every frame

H.264 is nearly lossless here and has colour at full resolution: the usual 4:2:0 halves it, which at
64x64 blurs the colours of a sprite into the background. Masks are not stored; `draw_clip` draws
them again from seed and index.
"""

from __future__ import annotations

import json
from pathlib import Path

from trainer.data.tars.manifest import VIDEO
from trainer.data.tars.write_shards import Record, write_shards
from trainer.data.world.clips import Clip, draw_clip
from trainer.data.world.sprites import SETS
from trainer.media.write_video import encode_video


def write_clips(
    folder: str | Path,
    count: int,
    *,
    seed: int = 0,
    sprites: str = "known",
    frames: int = 8,
    fps: float | None = None,
    per_shard: int = 1000,
) -> list[Path]:
    """Writes clips 0..count-1 of a seed as `clips-000000.tar`, ...; returns the shards.

    Raises:
        ValueError: as `write_shards` and `draw_clip`; no such set of sprites; a count below 1.
    """
    if sprites not in SETS:
        raise ValueError(f"sprites={sprites}: choose one of {', '.join(SETS)}")
    if count < 1:
        raise ValueError(f"count={count}: write at least one clip")
    names = SETS[sprites]
    records = (
        clip_record(draw_clip(seed, i, names=names, frames=frames, fps=fps), f"clip-{seed}-{i}")
        for i in range(count)
    )
    return write_shards(folder, records, per_shard=per_shard, stem="clips")


def clip_record(clip: Clip, key: str) -> Record:
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
        VIDEO: encode_video(clip.frames, clip.fps),
        "txt": clip.caption.encode(),
        "json": json.dumps(known).encode(),
    }
