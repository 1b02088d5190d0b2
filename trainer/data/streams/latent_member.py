"""Latents as they lie in a shard: `x.latent.npy`, the moments of one picture in fp16, with its
captions and what encoded it in `x.json`, and perhaps `x.cells.npy`, its mask."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.media.images import ImageError

HEADER = 128  # bytes before an array of few axes, as np.save writes it

if TYPE_CHECKING:
    from torch import Tensor


def latents_of(data: bytes, name: str) -> Tensor:
    """The moments (1, 2c, h, w) in fp16."""
    import torch

    found = _array(data, name)
    if found.dtype != np.float16 or found.ndim != 3:
        raise ImageError(
            f"{name}: {found.dtype} of {found.ndim} axes is not the latents of one picture"
        )
    return torch.from_numpy(found.copy())[None]


def cells_of(data: bytes, name: str) -> Tensor:
    """A mask (1, h, w) in fp32."""
    import torch

    return torch.from_numpy(_array(data, name).astype(np.float32))


def npy_bytes(array: np.ndarray) -> bytes:
    held = io.BytesIO()
    np.save(held, array, allow_pickle=False)
    return held.getvalue()


def checksum_of(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def check_encoder(name: str, facts: Mapping[str, Any], encoder: str | None) -> None:
    """Raises ValueError where latents were made by another encoder, or at another size."""
    if encoder is not None and facts.get("encoder") != encoder:
        raise ValueError(
            f"{name}: its latents were made by another VAE, or at another run.resolution; train "
            "with the backbone and the resolution that they were made for, or make them anew by "
            "`data build recipe=... out=...`"
        )


def _array(data: bytes, name: str) -> np.ndarray:
    try:
        shape, fortran, dtype = _header(data[:HEADER])
        found = np.frombuffer(data, dtype, offset=HEADER).reshape(shape)
    except (ValueError, EOFError, OSError, TypeError) as error:
        raise ImageError(f"{name}: damaged latents ({error}); make them anew") from error
    if fortran:
        raise ImageError(f"{name}: latents whose axes are stored last to first are not read")
    return found


@lru_cache(maxsize=64)
def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype of an array of few axes; `np.load` takes longer for this than for the
    array."""
    held = io.BytesIO(data)
    if np.lib.format.read_magic(held) != (1, 0):
        raise ValueError("another version of .npy")
    found: tuple[tuple[int, ...], bool, np.dtype] = np.lib.format.read_array_header_1_0(held)
    if held.tell() != HEADER or found[2].hasobject:
        raise ValueError("not the header of plain numbers")
    return found
