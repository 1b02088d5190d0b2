"""Large photos are decoded once to the size trained on: the same pixels, verified, bounded."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.data import decoded as module
from trainer.data.buckets import cut_size
from trainer.data.decoded import VERSION, Decoded
from trainer.data.source import Needs
from trainer.data.sources.folder import Folder
from trainer.media.images import ImageError, cover, read_image


def noise(path: Path, seed: int = 0, size: tuple[int, int] = (60, 40)) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, quality=90)
    return path


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / VERSION).glob("*"))


def reader(tmp_path: Path, **options: Any) -> Decoded:
    return Decoded(tmp_path / "cache", 16, **{"large": 1000, **options})


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []

    def counted(path: Path) -> Image.Image:
        seen.append(path.name)
        return read_image(path)

    monkeypatch.setattr(module, "read_image", counted)
    return seen


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("step", [0, 4])
def test_a_large_photo_is_decoded_once(tmp_path: Path, decodes: list[str], step: int) -> None:
    path = noise(tmp_path / "a.jpg")
    size = cut_size((60, 40), 16, step)
    wanted = cover(read_image(path), size)
    for _ in range(2):  # a later start
        photos = pickle.loads(pickle.dumps(reader(tmp_path, step=step)))  # as for a worker
        assert same(photos.check(path), wanted)
        assert same(photos.cut(path, size), wanted)
    assert decodes == ["a.jpg"]
    noise(path, seed=1)
    assert same(reader(tmp_path, step=step).cut(path, size), cover(read_image(path), size))
    assert decodes == ["a.jpg"] * 2 and len(kept(tmp_path)) == 2


def test_a_small_photo_is_not_kept(tmp_path: Path, decodes: list[str]) -> None:
    path = noise(tmp_path / "a.png", size=(30, 30))
    assert reader(tmp_path).check(path).size == (30, 30)
    reader(tmp_path).cut(path, (16, 16))
    assert Decoded(None, 16, large=0).cut(path, (16, 16)).size == (16, 16)
    assert decodes == ["a.png"] * 3 and kept(tmp_path) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "exchange"])
def test_what_was_kept_is_verified(tmp_path: Path, decodes: list[str], damage: str) -> None:
    path, other = noise(tmp_path / "a.jpg"), noise(tmp_path / "b.jpg", seed=1)
    wanted = reader(tmp_path).cut(path, (16, 16))
    place = kept(tmp_path)[0]
    data = bytearray(place.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "cut":
        data = data[: len(data) // 2]
    else:
        reader(tmp_path).cut(other, (16, 16))
        data = bytearray(next(file for file in kept(tmp_path) if file != place).read_bytes())
    place.write_bytes(data)
    before = len(decodes)
    assert same(reader(tmp_path).cut(path, (16, 16)), wanted)
    assert decodes[before:] == ["a.jpg"]


def test_they_take_no_more_room_than_allowed(tmp_path: Path, decodes: list[str]) -> None:
    paths = [noise(tmp_path / f"{n}.jpg", seed=n) for n in range(4)]
    reader(tmp_path).cut(paths[0], (16, 16))
    one = kept(tmp_path)[0].stat().st_size
    most = int(2.5 * one)
    os.utime(kept(tmp_path)[0], (1, 1))  # not used for a long time
    photos = reader(tmp_path, most=most)
    for path in paths[1:]:
        photos.cut(path, (16, 16))
    assert sum(file.stat().st_size for file in kept(tmp_path)) <= most
    decodes.clear()
    for path in paths[1:3]:  # the first that this process has used stay, and the old one is gone
        reader(tmp_path, most=most).cut(path, (16, 16))
    assert decodes == []
    reader(tmp_path, most=0).cut(paths[3], (16, 16))
    assert decodes == ["3.jpg"]


def test_room_for_one_more_is_used_to_the_last_byte(tmp_path: Path, decodes: list[str]) -> None:
    paths = [noise(tmp_path / f"{n}.jpg", seed=n) for n in range(2)]
    for path in paths:
        reader(tmp_path).cut(path, (16, 16))
    both = sum(file.stat().st_size for file in kept(tmp_path))
    for most, stay in ((both, 2), (both - 1, 1)):
        for file in kept(tmp_path):
            file.unlink()
        photos = reader(tmp_path, most=most)
        for path in paths:
            photos.cut(path, (16, 16))
        assert len(kept(tmp_path)) == stay


def test_a_cache_nobody_may_write_costs_time_only(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    path = noise(tmp_path / "a.jpg")
    assert same(reader(tmp_path).cut(path, (16, 16)), cover(read_image(path), (16, 16)))


def test_damaged_photos_are_named(tmp_path: Path) -> None:
    path = noise(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes()[:700])
    for read in (reader(tmp_path).check, lambda path: reader(tmp_path).cut(path, (16, 16))):
        with pytest.raises(ImageError, match=r"a\.jpg: truncated or damaged"):
            read(path)
        with pytest.raises(ImageError, match=r"none\.jpg: no such file"):
            read(tmp_path / "none.jpg")
    assert kept(tmp_path) == []


@pytest.mark.parametrize("buckets", [0, 4])
def test_a_folder_gives_the_same_pictures(
    tmp_path: Path, buckets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate([(60, 40), (40, 60), (20, 20)]):
        noise(folder / f"{number}.jpg", number, size)
    source = Folder(folder=folder, template="a", buckets=buckets, validation=1)
    needs = Needs(16, 4, lambda *_: (), tmp_path / "cache", lambda: "tiny")
    plain = source.open(needs)[0]
    pictures = [plain.image(i) for i in range(2)]
    monkeypatch.setattr(Decoded, "_is_large", lambda self, shape: shape[0] * shape[1] > 1000)
    for _ in range(2):
        train = source.open(needs)[0]
        assert all(train.image(i).equal(pictures[i]) for i in range(2))
        assert train.fingerprint() == plain.fingerprint() and train.identity() == plain.identity()
    assert len(kept(tmp_path)) == 2
