"""Caches: VAE posteriors, every image encoded once and kept as one fp16 array that several runs and
ranks can map; pictures that an unchanging model paints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.common.atomic import written_whole
from trainer.data.source import Dataset


def moments(
    dataset: Dataset,
    encode: Callable[[Tensor], Tensor],
    encoder: str,
    folder: Path,
    batch_size: int = 32,
) -> np.ndarray:
    """Posterior moments (n, 2c, h, w) float16 of a dataset whose images never change, read from the
    cache or made; `rows` tells which are those of a sample.

    Args:
        encode: pixels (b, 3, H, W) to moments (b, 2c, h, w).
        encoder: identity of the encoder's weights; with the dataset's fingerprint it keys the file.
    """
    assert dataset.fixed, "only images that never change can be cached"
    key = hashlib.sha256(f"{dataset.fingerprint()}|{encoder}|fp16".encode()).hexdigest()[:24]
    path = folder / "latents" / f"{key}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as part:
            _write(part, dataset, encode, batch_size)
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def cached_tensor(key: str, paint: Callable[[], Tensor], folder: Path) -> Tensor:
    """Pictures (n, 3, H, W) float32, read from the cache or painted. key: all they depend on."""
    path = folder / "painted" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as part:
            np.save(part, paint().float().cpu().numpy())
    return torch.from_numpy(np.load(path, allow_pickle=False))


def rows(dataset: Dataset, index: int) -> slice:
    """Where the moments of sample `index` lie: one row a frame, sample after sample."""
    start = 0
    for group, frames in zip(dataset.groups, dataset.frames, strict=True):
        if index in group:
            start += (index - group.start) * frames
            return slice(start, start + frames)
        start += len(group) * frames
    raise IndexError(f"sample {index} is in no group")


def _write(
    path: Path,
    dataset: Dataset,
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
) -> None:
    array, start = None, 0
    total = rows(dataset, len(dataset) - 1).stop
    for images in _batches(dataset, batch_size):
        found = encode(images).half().cpu().numpy()
        if array is None:
            array = np.lib.format.open_memmap(path, "w+", np.float16, (total, *found.shape[1:]))
        array[start : start + len(found)] = found
        start += len(found)
    assert array is not None and start == total
    array.flush()


def _batches(dataset: Dataset, batch_size: int) -> Iterator[Tensor]:
    """Every frame in order, (b, 3, H, W) at a time: b is `batch_size`, or one clip that is
    longer."""
    held: list[Tensor] = []
    for index in range(len(dataset)):
        frames = frames_of(dataset.image(index))
        if held and sum(map(len, held)) + len(frames) > batch_size:
            yield torch.cat(held)
            held = []
        held.append(frames)
    yield torch.cat(held)


def frames_of(image: Tensor) -> Tensor:
    """A clip (frames, 3, H, W) as it is; an image (3, H, W) as a clip of one frame."""
    return image if image.ndim == 4 else image[None]
