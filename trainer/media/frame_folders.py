"""Folders of frames as videos: dance/0001.png, dance/0002.png and so on are the frames of one clip,
in natural order, all of one size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from trainer.common.left_by_systems import left_by_system
from trainer.media.images import ImageError, read_image
from trainer.media.photo_listing import READABLE_IMAGES, natural_order
from trainer.media.read_video import SLACK, VideoFacts


def frames_in(folder: Path) -> list[Path]:
    """The pictures of a folder in natural order, 2 before 10; none where it has none."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in READABLE_IMAGES]
    return sorted((path for path in found if not left_by_system(path.name)), key=natural_order)


def list_frame_folders(place: Path) -> list[Path]:
    """The folders of frames in a folder, in natural order; or the folder itself, where it holds
    frames."""
    if not place.is_dir():
        return []
    if frames_in(place):
        return [place]
    below = [p for p in place.iterdir() if p.is_dir() and not left_by_system(p.name)]
    return sorted((path for path in below if frames_in(path)), key=natural_order)


def examine_frames(folder: Path, name: str, rate: float) -> VideoFacts:
    """Decodes every frame of a folder. rate: frames a second, which a folder does not say.

    Raises:
        ImageError: a frame cannot be read, or has another size than the first.
    """
    paths, size = frames_in(folder), None
    for path in paths:
        own = read_image(path).size
        if size is not None and own != size:
            raise ImageError(
                f"{name}: {path.name} has {own[0]}x{own[1]} pixels and {paths[0].name} "
                f"{size[0]}x{size[1]}; the frames of a clip have one size"
            )
        size = own
    if size is None:
        raise ImageError(f"{name}: no frame in this folder; add them, or remove it")
    last = (len(paths) - 1) / rate
    return VideoFacts(*size, frames=len(paths), first=0.0, last=last, rate=rate)


def read_frames(
    folder: Path, name: str, *, video: VideoFacts, times: Sequence[float]
) -> list[Image.Image]:
    """The frames that a player shows at `times`, in seconds after the first, as `read_clip`."""
    paths = frames_in(folder)
    if len(paths) != video.frames:
        raise ImageError(f"{name}: {len(paths)} frames, and it had {video.frames}; put them back")
    chosen = [min(int(time * video.rate + SLACK), len(paths) - 1) for time in times]
    return [read_image(paths[number]) for number in chosen]


def digest_of_frames(folder: Path) -> str:
    """SHA-256 over the names and bytes of the frames."""
    digest = hashlib.sha256()
    for path in frames_in(folder):
        with path.open("rb") as file:
            digest.update(repr((path.name, hashlib.file_digest(file, "sha256").digest())).encode())
    return digest.hexdigest()
