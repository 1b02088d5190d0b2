"""Which part of its picture a sample shows: found again in the pixels, of every source, and the
same with cached latents."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tars import pack

from trainer.data.class_images import Pair
from trainer.data.concept_data import ConceptData, View
from trainer.data.crops import Cropped, central, whole
from trainer.data.decoded import Decoded
from trainer.data.folder_photos import Photos, Row
from trainer.data.latent_cache import moments
from trainer.data.loader import collate
from trainer.data.mixed import Mixed, Stills
from trainer.data.plan import Slot
from trainer.data.source import Needs
from trainer.data.sources.shards import Shards
from trainer.data.sources.world import Scenes
from trainer.data.sources.world_clips import DrawnClips
from trainer.media.images import cover


def gradient(width: int, height: int) -> Image.Image:
    """Red grows with the column and green with the row, from 0 to 255."""
    across = np.linspace(0, 255, width)[None].repeat(height, 0)
    down = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([across, down, 0 * down], -1).round().astype(np.uint8))


def told(data: Any, *indices: int, seed: int = 0) -> list[list[float]]:
    """What a backbone that is told so is told of these samples."""
    slots = [Slot(index, place, 1.0) for place, index in enumerate(indices)]
    batch = collate(data, slots, step=0, seed=seed, moments=None, reads=["crop"])
    found: list[list[float]] = batch.inputs["crop"].tolist()
    return found


def refuse(*_: Any) -> Any:
    raise AssertionError("this is not needed")


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 112)])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (64, 64), (50, 40)])
def test_the_corner_is_where_the_cut_begins(shape: tuple[int, int], size: tuple[int, int]) -> None:
    """Red and green of the first pixel say where it was in the whole picture."""
    height, width, top, left, *target = central(shape, size)
    assert (width, height) == shape and target == [size[1], size[0]]
    cut = np.asarray(cover(gradient(*shape), size), np.float32)
    scale = max(size[0] / shape[0], size[1] / shape[1])
    found = cut[3, 3, :2] / 255 * np.array(shape) * scale  # of a pixel inside, for the filter
    assert abs(found[0] - (left + 3)) < 2.5 and abs(found[1] - (top + 3)) < 2.5
    assert min(top, left) == 0


def test_of_photos_in_a_folder(tmp_path: Path) -> None:
    for name, shape in (("a", (300, 200)), ("b", (64, 64))):
        gradient(*shape).save(tmp_path / f"{name}.png")
    rows = [Row(tmp_path / f"{name}.png", ("",), name) for name in "ab"]
    data = Photos(rows, 64)
    assert told(data, 0, 1) == [[200, 300, 0, 16, 64, 64], [64, 64, 0, 0, 64, 64]]


def test_of_buckets(tmp_path: Path) -> None:
    gradient(300, 200).save(tmp_path / "a.png")
    data = Photos([Row(tmp_path / "a.png", ("",), "a")], 64, step=16)
    width, height = data.sizes[0]
    assert width > height
    assert data.crop(0) == central((300, 200), (width, height))


def test_of_a_concept_whose_photo_was_cut_before(tmp_path: Path) -> None:
    """A large photo is kept as a square; the size of the whole one is still known."""
    from trainer.data.class_images import pair_of
    from trainer.media.photo_folder import read_folder
    from trainer.media.photo_listing import list_photos

    folder = tmp_path / "photos"
    folder.mkdir()
    gradient(300, 200).save(folder / "a.png")
    kept = Decoded(tmp_path / "cache", 64, large=1000)
    (photo,), _ = read_folder(folder, opener=kept.shrunk)
    pair = pair_of(photo, ["a cat"], list_photos(folder))
    assert (pair.image.size, pair.shape) == ((64, 64), (300, 200))
    data = ConceptData([[pair]], View(side=64, divisor=4))
    assert told(data, 0) == [[200, 300, 0, 16, 64, 64]]
    augmented = ConceptData([[pair]], View(side=64, divisor=4, augment=True))
    found = {tuple(told(augmented, 0, seed=n)[0]) for n in range(40)}
    assert {crop[0] for crop in found} == {64, 200} and len(found) > 4


def test_of_a_generated_picture() -> None:
    data = ConceptData([[Pair(gradient(80, 64), ("",), "a")]], View(side=64, divisor=4))
    assert data.crop(0) == (64, 80, 0, 8, 64, 64)


def test_latents_from_the_cache_are_told_the_same(tmp_path: Path) -> None:
    for name, shape in (("a", (300, 200)), ("b", (120, 160))):
        gradient(*shape).save(tmp_path / f"{name}.png")
    data = Photos([Row(tmp_path / f"{name}.png", ("",), name) for name in "ab"], 64)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return pixels[:, :2, ::8, ::8]

    cached = moments(data, encode, "encoder", tmp_path / "cache")
    slots = [Slot(1, 0, 1.0), Slot(0, 1, 1.0)]
    plain, kept = (
        collate(data, slots, step=0, seed=0, moments=each, reads=["crop"])
        for each in (None, cached)
    )
    assert plain.inputs["crop"].tolist() == [[160, 120, 11, 0, 64, 64], [200, 300, 0, 16, 64, 64]]
    assert torch.equal(plain.inputs["crop"], kept.inputs["crop"])
    assert plain.inputs["crop"].dtype == torch.float32


def test_a_source_that_does_not_cut_gives_whole_pictures() -> None:
    scenes: Any = Scenes(0, count=2, sprites="known", side=32)
    assert told(scenes, 0) == [[32, 32, 0, 0, 32, 32]] == [list(whole(scenes.image(0)))]


def test_of_shards(tmp_path: Path) -> None:
    data = io.BytesIO()
    gradient(300, 200).save(data, "PNG")
    pack(tmp_path / "a.tar", ("0.png", data.getvalue()), ("0.txt", b"a cat"))
    needs = Needs(64, 4, lambda *_: [], tmp_path / "cache", lambda: "tiny")
    train, _ = Shards(shards=tmp_path).open(needs)
    assert told(train, 0) == [[200, 300, 0, 16, 64, 64]]
    assert isinstance(train, Cropped)


def test_of_mixed_data(tmp_path: Path) -> None:
    gradient(300, 200).save(tmp_path / "a.png")
    photos = Photos([Row(tmp_path / "a.png", ("",), "a")], 64)
    scenes: Any = Scenes(0, count=2, sprites="known", side=64)
    mixed = Mixed(photos, scenes, 0.5)
    assert mixed.crop(0) == photos.crop(0) == Stills(photos).crop(0)
    assert mixed.crop(1) == whole(scenes.image(0)) == (64, 64, 0, 0, 64, 64)


def test_headers_are_not_read_for_a_backbone_that_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient(300, 200).save(tmp_path / "a.png")
    data = Photos([Row(tmp_path / "a.png", ("",), "a")], 64)
    cached = moments(data, lambda pixels: pixels[:, :2, ::8, ::8], "encoder", tmp_path / "cache")
    monkeypatch.setattr("trainer.data.folder_photos.upright_size", refuse)
    for kept in (None, cached):
        batch = collate(data, [Slot(0, 0, 1.0)], step=0, seed=0, moments=kept)
        assert batch.inputs == {}
    with pytest.raises(AssertionError, match="not needed"):
        told(data, 0)


def test_no_scene_is_drawn_for_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes: Any = Scenes(0, count=2, sprites="known", side=64)
    clips: Any = DrawnClips(0, count=2, sprites="known", side=32, frames=3, fps=None)
    wanted = [whole(clips.image(1)), whole(clips.image(1)), whole(scenes.image(1))]
    for source in (Scenes, DrawnClips):
        monkeypatch.setattr(source, "image", refuse)
    mixed = Mixed(clips, scenes, 0.5)
    assert [mixed.crop(1), Stills(clips).crop(1), mixed.crop(3)] == wanted


@pytest.mark.parametrize("shape", [(300, 200), (80, 120)])
def test_a_shards_picture_is_cut_from_its_middle(shape: tuple[int, int], tmp_path: Path) -> None:
    file = io.BytesIO()
    gradient(*shape).save(file, "PNG")
    (tmp_path / "s").mkdir()
    pack(tmp_path / "s" / "a.tar", ("0.png", file.getvalue()), ("0.txt", b"a"))
    data, _ = Shards(shards=str(tmp_path / "s")).open(
        Needs(64, 4, refuse, tmp_path / "cache", refuse)
    )
    assert isinstance(data, Cropped)
    assert data.crop(0) == central(shape, (64, 64))
