"""Large photos are decoded once: cut to the size that is trained on, they are kept in the cache as
PNG, so that later starts and data workers read a small file with the same pixels.

A file is found by the SHA-256 of the photo's bytes and the size; its own checksums are verified
when it is read, and a damaged one is made anew. All together take at most `most` bytes: those that
were not used for the longest time go first, and what this process has used stays.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.common.atomic import written_atomically
from trainer.data.buckets import Size, cut_size
from trainer.data.identity import sha256_of_file
from trainer.data.kept import PLACE, place_of, read_kept
from trainer.media.images import DAMAGED_IMAGE, cover, read_image, upright_size
from trainer.media.made_by import png_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

LARGE = 2_000_000  # pixels; smaller photos are decoded faster than they are worth keeping
MOST = 4 * 2**30  # bytes
VERSION = "photos-1"


@dataclass
class Decoded:
    """Photos cut to the size of their bucket, or to a square where `step` is 0.

    cache: the folder for what is kept between runs, None to keep nothing; side: of the square.
    """

    cache: Path | None
    side: int
    step: int = 0
    large: int = LARGE
    most: int = MOST
    started: float = field(default_factory=time.time)

    def check(self, path: Path) -> Image:
        """The photo, of any size, decoded now or before; raises ImageError as `read_image`."""
        try:
            shape = upright_size(path)
        except DAMAGED_IMAGE:
            return read_image(path)  # which says what is wrong
        if not self._is_large(shape):
            return read_image(path)
        return self.cut(path, cut_size(shape, self.side, self.step))

    def shrunk(self, path: Path) -> Image:
        """The photo, cut to the square if it is large and not smaller than that; raises ImageError
        as `read_image`."""
        try:
            whole = min(upright_size(path)) < self.side
        except DAMAGED_IMAGE:
            whole = True
        return read_image(path) if whole else self.check(path)

    def cut(self, path: Path, size: Size) -> Image:
        """The photo cut to `size`; raises ImageError as `read_image`."""
        if self.cache is None or not self._is_large(upright_size(path)):
            return cover(read_image(path), size)
        name = f"{sha256_of_file(path)[:32]}-{size[0]}x{size[1]}.png"
        place = self.cache / VERSION / name
        found = read_kept(place)
        if found is not None and found.size == size:
            with suppress(OSError):  # a cache that may only be read
                os.utime(place)
            return found
        made = cover(read_image(path), size)
        with suppress(OSError):  # the disk may be full
            self._keep(place, made)
        return made

    def _is_large(self, shape: Size) -> bool:
        return self.cache is not None and shape[0] * shape[1] > self.large

    def _keep(self, place: Path, made: Image) -> None:
        data = png_bytes(made, {PLACE: place_of(place)})
        place.parent.mkdir(parents=True, exist_ok=True)
        if not self._has_room(place.parent, len(data)):
            return
        with written_atomically(place) as part:
            part.write_bytes(data)

    def _has_room(self, folder: Path, size: int) -> bool:
        """Whether so many bytes fit, after photos that were not used since this began have gone."""
        stats = {path: path.stat() for path in folder.glob("*.png")}
        total = sum(stat.st_size for stat in stats.values()) + size
        for path in sorted(stats, key=lambda path: stats[path].st_mtime):
            if total <= self.most or stats[path].st_mtime >= self.started:
                break
            path.unlink(missing_ok=True)
            total -= stats[path].st_size
        return total <= self.most
