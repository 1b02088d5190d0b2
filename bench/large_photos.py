"""The source `folder` on photos of 24 megapixels: a first start, a second one, and reading each
photo once, with what is kept of large photos and without.

    OMP_NUM_THREADS=1 python bench/large_photos.py            # about two minutes, 40 MB of photos
    OMP_NUM_THREADS=1 python bench/large_photos.py --quick    # two photos

The photos are JPEGs with detail at every scale, cut to 512x512. The bar: what is kept makes a
second start, and the reading after it, at least ten times as fast. Figures are seconds a photo.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from _common import Bars, parser_of
from PIL import Image

from trainer.data import folder_photos
from trainer.data.decoded import Decoded
from trainer.data.source import Needs
from trainer.data.sources.folder import Folder

SIZE, SIDE = (6000, 4000), 512
PHOTOS, QUICK = 8, 2
FASTER = 10.0


def photo(path: Path, seed: int) -> None:
    """A JPEG with detail at every scale, about as large as a camera writes it."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.float32)
    for cells in (6, 60, 600, 3000):
        noise = rng.integers(0, 256, (cells * 2 // 3, cells, 3), np.uint8)
        pixels += np.asarray(Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC)) / 4
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def starts(folder: Path, cache: Path, count: int) -> dict[str, tuple[float, float]]:
    """Seconds a photo that a first and a second start take, and reading each photo after it."""
    needs = Needs(SIDE, 8, lambda *_: (), cache, lambda: "bench")
    found = {}
    with mock.patch.object(folder_photos, "KEEP_BYTES", 0):  # as for a large data set
        for name in ("first", "second"):
            source = Folder(folder=folder, template="a photo")
            opening, data = timed(lambda source=source: source.open(needs)[0])
            reading, _ = timed(lambda data=data: [data.image(i) for i in range(len(data))])
            found[name] = (opening / count, reading / count)
    return found


def main() -> None:
    options = parser_of(__doc__).parse_args()
    bars, count = Bars("large_photos", options.quick), QUICK if options.quick else PHOTOS
    with tempfile.TemporaryDirectory() as place:
        folder, cache = Path(place) / "photos", Path(place) / "cache"
        folder.mkdir()
        for seed in range(count):
            photo(folder / f"{seed}.jpg", seed)
        size = sum(path.stat().st_size for path in folder.iterdir()) / count
        bars.note("photos", count)
        bars.note("megabytes_a_photo", round(size / 1e6, 1))
        with mock.patch.object(Decoded, "_is_large", return_value=False):
            plain = starts(folder, cache, count)
        kept = starts(folder, cache, count)
        for name, taken in (("nothing_kept", plain), ("kept", kept)):
            for start, (opening, reading) in taken.items():
                bars.note(f"{name}_{start}_start", round(opening, 3))
                bars.note(f"{name}_{start}_reading", round(reading, 3))
        for part, index in (("start", 0), ("reading", 1)):
            times = plain["second"][index] / kept["second"][index]
            bars.at_least(f"second_{part}_times_as_fast", times, FASTER)
        total = sum(path.stat().st_size for path in cache.rglob("*.png"))
        bars.note("kept_megabytes_a_photo", round(total / count / 1e6, 2))
    bars.write()


if __name__ == "__main__":
    main()
