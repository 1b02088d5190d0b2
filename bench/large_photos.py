"""Times the source `folder` on photos of 24 megapixels: a first start, later starts, and reading
each photo once, with what is kept of large photos and without.

    OMP_NUM_THREADS=1 python bench/large_photos.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from trainer.data import folder_photos
from trainer.data.decoded import LARGE, Decoded
from trainer.data.source import Needs
from trainer.data.sources.folder import Folder

SIZE, SIDE = (6000, 4000), 512


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


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--photos", type=int, default=8)
    count = words.parse_args().photos
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "photos"
        folder.mkdir()
        for seed in range(count):
            photo(folder / f"{seed}.jpg", seed)
        size = sum(path.stat().st_size for path in folder.iterdir()) / count
        print(f"{count} photos of {SIZE[0]}x{SIZE[1]}, {size / 1e6:.1f} MB each, cut to {SIDE}")
        source = Folder(folder=folder, template="a photo")
        needs = Needs(SIDE, 8, lambda *_: (), Path(place) / "cache", lambda: "bench")
        never = mock.patch.object(Decoded, "_is_large", return_value=False)
        kept = mock.patch.object(Decoded, "large", LARGE)
        unheld = mock.patch.object(folder_photos, "KEEP_BYTES", 0)  # as for a large data set
        for name, patch in (("without", never), ("with", kept)):
            with patch, unheld:
                for start in ("first", "second"):
                    seconds, opened = timed(lambda: source.open(needs)[0])
                    read, _ = timed(lambda data=opened: [data.image(i) for i in range(len(data))])
                    print(
                        f"{name} keeping, {start} start: {seconds / count:.3f} s a photo; reading "
                        f"each once: {read / count:.3f} s a photo"
                    )
        total = sum(path.stat().st_size for path in (Path(place) / "cache").rglob("*.png"))
        print(f"kept: {total / count / 1e6:.2f} MB a photo")


if __name__ == "__main__":
    main()
