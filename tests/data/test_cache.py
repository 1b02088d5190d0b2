"""The cache of latents: an interruption keeps the batches that are finished, damage is noticed, and
the array is bit for bit that of an uninterrupted run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.data import cache

COUNT, AT_ONCE = 10, 4


class Pictures:
    """Ten pictures of 8x8, each of one value."""

    groups: Sequence[range] = (range(COUNT),)
    frames: Sequence[int] = (1,)
    fixed = True

    def __len__(self) -> int:
        return COUNT

    def image(self, index: int) -> Tensor:
        return torch.full((3, 8, 8), index / COUNT)

    def fingerprint(self) -> str:
        return "ten pictures"


class Encoder:
    """Moments (b, 2, 2, 2) that are the picture's value; breaks at call `breaks`."""

    def __init__(self, breaks: int | None = None) -> None:
        self.sizes: list[int] = []
        self.breaks = breaks

    def __call__(self, pixels: Tensor) -> Tensor:
        if len(self.sizes) == self.breaks:
            raise RuntimeError("interrupted")
        self.sizes.append(len(pixels))
        return pixels[:, :2, ::4, ::4]


def made(folder: Path, encode: Encoder) -> np.ndarray:
    data: cache.Dataset = Pictures()  # type: ignore[assignment]
    return cache.moments(data, encode, "vae", folder=folder, batch_size=AT_ONCE)


def stored(folder: Path) -> Path:
    (path,) = (folder / "latents").iterdir()
    return path


def test_rows_are_the_pictures(tmp_path: Path) -> None:
    encode = Encoder()
    array = made(tmp_path, encode)
    assert encode.sizes == [4, 4, 2]
    wanted = torch.stack([Pictures().image(i)[:2, ::4, ::4] for i in range(COUNT)]).half()
    assert np.array_equal(array, wanted.numpy()) and array.dtype == np.float16


def test_an_interruption_keeps_the_finished_batches(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", Encoder())
    with pytest.raises(RuntimeError, match="interrupted"):
        made(tmp_path / "broken", Encoder(breaks=2))
    rest = Encoder()
    assert np.array_equal(made(tmp_path / "broken", rest), whole)
    assert rest.sizes == [2]
    files = [stored(tmp_path / name).read_bytes() for name in ("whole", "broken")]
    assert files[0] == files[1]  # nothing else is left in the folder, either


def test_a_damaged_batch_is_encoded_anew(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", Encoder())
    with pytest.raises(RuntimeError, match="interrupted"):
        made(tmp_path / "broken", Encoder(breaks=2))
    parts = sorted((tmp_path / "broken" / "latents").glob("*.parts/*.npz"))
    assert len(parts) == 2
    data = bytearray(parts[1].read_bytes())
    data[len(data) // 2] ^= 1
    parts[1].write_bytes(data)
    rest = Encoder()
    assert np.array_equal(made(tmp_path / "broken", rest), whole)
    assert rest.sizes == [4, 2]


@pytest.mark.parametrize("where", [130, -10, -1])
def test_a_flipped_bit_is_noticed(where: int, tmp_path: Path) -> None:
    """In the values, at their end, and in the checksum itself."""
    whole = np.array(made(tmp_path, Encoder()))
    data = bytearray(stored(tmp_path).read_bytes())
    data[where] ^= 1
    stored(tmp_path).write_bytes(data)
    again = Encoder()
    assert np.array_equal(made(tmp_path, again), whole)
    assert again.sizes == [4, 4, 2]


def test_a_cut_array_is_made_anew(tmp_path: Path) -> None:
    whole = np.array(made(tmp_path, Encoder()))
    stored(tmp_path).write_bytes(stored(tmp_path).read_bytes()[:-40])
    again = Encoder()
    assert np.array_equal(made(tmp_path, again), whole) and again.sizes == [4, 4, 2]


def test_an_array_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """It has no checksum behind it."""
    whole = np.array(made(tmp_path, Encoder()))
    np.save(stored(tmp_path), whole)
    assert np.array_equal(made(tmp_path, Encoder(breaks=0)), whole)
