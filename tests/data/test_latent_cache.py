"""The cache of latents: an interruption keeps the batches that are finished, damage is noticed, and
the array is bit for bit that of an uninterrupted run."""

from __future__ import annotations

import pickle
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.data import latent_cache

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


def made(folder: Path, encode: Encoder) -> latent_cache.Latents:
    data: latent_cache.Dataset = Pictures()  # type: ignore[assignment]
    return latent_cache.moments(data, encode, "vae", folder=folder, batch_size=AT_ONCE)


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


def of_an_earlier_version(path: Path) -> None:
    """It has no checksum behind it, or one of the values alone."""
    np.save(path, np.load(path))


def with_a_checksum_of_the_values_alone(path: Path) -> None:
    array = np.load(path)
    np.save(path, array)
    path.write_bytes(path.read_bytes() + b"CRC:" + zlib.crc32(array.tobytes()).to_bytes(4, "big"))


def with_rows_exchanged(path: Path) -> None:
    data, row = bytearray(path.read_bytes()), 2 * 2 * 2 * 2
    data[128 : 128 + 2 * row] = data[128 + row : 128 + 2 * row] + data[128 : 128 + row]
    path.write_bytes(data)


def with_another_shape(path: Path) -> None:
    """The same values, five rows in place of ten."""
    data = path.read_bytes()
    path.write_bytes(data.replace(b"(10, 2, 2, 2)", b"(5, 4, 2, 2) ", 1))


def of_another_data_set(path: Path) -> None:
    class Others(Pictures):
        def fingerprint(self) -> str:
            return "ten others"

        def image(self, index: int) -> Tensor:
            return super().image(COUNT - 1 - index)

    others: latent_cache.Dataset = Others()  # type: ignore[assignment]
    latent_cache.moments(others, Encoder(), "vae", folder=path.parent / "other")
    path.write_bytes(stored(path.parent / "other").read_bytes())
    shutil.rmtree(path.parent / "other")


@pytest.mark.parametrize(
    "spoil",
    [
        of_an_earlier_version,
        with_a_checksum_of_the_values_alone,
        with_rows_exchanged,
        with_another_shape,
        of_another_data_set,
    ],
)
def test_what_is_not_the_array_of_this_data_set_is_made_anew(
    spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    whole = np.array(made(tmp_path, Encoder()))
    before = stored(tmp_path).read_bytes()
    spoil(stored(tmp_path))
    again = Encoder()
    assert np.array_equal(made(tmp_path, again), whole)
    assert again.sizes == [4, 4, 2]
    assert stored(tmp_path).read_bytes() == before


def test_batches_that_were_exchanged_are_encoded_anew(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", Encoder())
    with pytest.raises(RuntimeError, match="interrupted"):
        made(tmp_path / "broken", Encoder(breaks=2))
    one, other = sorted((tmp_path / "broken" / "latents").glob("*.parts/*.npz"))
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    rest = Encoder()
    assert np.array_equal(made(tmp_path / "broken", rest), whole)
    assert rest.sizes == [4, 4, 2]


def test_a_row_that_changes_under_a_run_is_noticed_in_its_workers_too(tmp_path: Path) -> None:
    found = made(tmp_path, Encoder())
    copied = pickle.loads(pickle.dumps(found))
    assert len(pickle.dumps(found)) < 1000  # a data worker maps the file itself
    assert np.array_equal(copied[2:4], found[2:4])
    with stored(tmp_path).open("rb+") as file:
        file.seek(128 + 3 * 16 + 5)
        file.write(b"x")
    assert len(found[0:3]) == 3
    for latents in (found, copied):
        with pytest.raises(ValueError, match=r"npy: row 3 has changed since it was verified"):
            latents[2:4]


def test_a_picture_whose_latents_are_not_finite_is_named(tmp_path: Path) -> None:
    class Bright(Pictures):
        def image(self, index: int) -> Tensor:
            return super().image(index) * (1e6 if index == 6 else 1)

        def key(self, index: int) -> str:
            return f"{index}.jpg"

    bright: latent_cache.Dataset = Bright()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"the VAE makes values of 6\.jpg that are not finite"):
        latent_cache.moments(bright, Encoder(), "vae", folder=tmp_path, batch_size=AT_ONCE)


class Clips(Pictures):
    """Three clips of 5 frames, then two pictures."""

    frames = (5, 1)
    groups = (range(3), range(3, 5))

    def __len__(self) -> int:
        return 5

    def image(self, index: int) -> Tensor:
        shape = (5, 3, 8, 8) if index < 3 else (3, 8, 8)
        return torch.arange(torch.Size(shape).numel()).view(shape) / 1000 + index

    def fingerprint(self) -> str:
        return "clips and pictures"


def test_an_encoder_that_shrinks_clips_gets_one_in_each_call(tmp_path: Path) -> None:
    """Latent frames: the first one, and the mean of four more."""
    sizes = []

    def encode(pixels: Tensor) -> Tensor:
        sizes.append(len(pixels))
        small = pixels[:, :2, ::4, ::4]
        later = small[1:].split(4) if len(small) > 1 else ()
        return torch.stack([small[0], *(part.mean(0) for part in later)])

    data: latent_cache.Dataset = Clips()  # type: ignore[assignment]
    found = latent_cache.moments(data, encode, "vae", tmp_path, batch_size=10, shrinks=4)
    assert sizes == [5, 5, 5, 1, 1] and len(found) == 3 * 2 + 2
    for index in range(5):
        own = latent_cache.rows(data, index, 4)
        image = latent_cache.frames_of(data.image(index))
        assert own.stop - own.start == (2 if index < 3 else 1)
        assert np.array_equal(found[own], encode(image).half().numpy())
    again = latent_cache.moments(data, pytest.fail, "vae", tmp_path, shrinks=4)  # type: ignore[arg-type]
    assert np.array_equal(again, found) and again.shrinks == 4
    copied = pickle.loads(pickle.dumps(found))
    assert copied.shrinks == 4 and np.array_equal(copied, found)
