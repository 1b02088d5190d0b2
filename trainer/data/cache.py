"""A cache of VAE posteriors: every image encoded once, kept as one fp16 array that several runs and
ranks can map."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.data import Dataset


def moments(
    dataset: Dataset,
    encode: Callable[[Tensor], Tensor],
    encoder: str,
    folder: Path,
    batch_size: int = 32,
) -> np.ndarray:
    """Posterior moments (n, 2c, h, w) float16 of a dataset whose images never change, read from the
    cache or made.

    Args:
        encode: pixels (b, 3, H, W) to moments (b, 2c, h, w).
        encoder: identity of the encoder's weights; with the dataset's fingerprint it keys the file.
    """
    assert dataset.fixed, "only images that never change can be cached"
    key = hashlib.sha256(f"{dataset.fingerprint()}|{encoder}|fp16".encode()).hexdigest()[:24]
    path = folder / "latents" / f"{key}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{key}.{os.getpid()}.npy")
        try:
            _write(part, dataset, encode, batch_size)
            os.replace(part, path)  # a name appears only when its file is whole
        finally:
            part.unlink(missing_ok=True)
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _write(
    path: Path,
    dataset: Dataset,
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
) -> None:
    array = None
    for start in range(0, len(dataset), batch_size):
        rows = range(start, min(start + batch_size, len(dataset)))
        found = encode(torch.stack([dataset.image(i) for i in rows])).half().cpu().numpy()
        if array is None:
            array = np.lib.format.open_memmap(
                path, "w+", np.float16, (len(dataset), *found.shape[1:])
            )
        array[rows.start : rows.stop] = found
    assert array is not None
    array.flush()
