"""Aspect-ratio buckets: every batch of one size, every rank its part of it, no sample favoured."""

from __future__ import annotations

import pickle
from collections import Counter
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from pydantic import ValidationError

from trainer.__main__ import main
from trainer.data.buckets import arrange, bucket_sizes, nearest_bucket
from trainer.data.loader import Fixed, Planned, loader
from trainer.data.plan import StepPlan
from trainer.data.source import Needs
from trainer.data.sources.folder import Folder
from trainer.data.sources.shards import Shards
from trainer.data.tars.write_shards import write_shards
from trainer.media.images import ImageError, upright_size

HELD = (1, 5, 30, 64)  # samples in each bucket
SHAPES = ((64, 32), (48, 40), (40, 48), (32, 64))


def plan(batch_size: int = 8, seed: int = 3) -> StepPlan:
    stops = np.cumsum(HELD).tolist()
    groups = tuple((stop - held, stop) for held, stop in zip(HELD, stops, strict=True))
    shares = tuple(held / sum(HELD) for held in HELD)
    ones = (1.0,) * len(HELD)
    return StepPlan(groups, shares, ones, batch_size, seed, (1,) * len(HELD), SHAPES)


def bucket(index: int) -> int:
    return next(i for i, (start, stop) in enumerate(plan().groups) if start <= index < stop)


def test_sizes_have_as_many_pixels_as_the_square() -> None:
    found = bucket_sizes(512, 64)
    assert {(512, 512), (576, 448), (640, 384), (384, 640)} <= set(found)
    for width, height in found:
        assert width % 64 == 0 == height % 64
        assert width * height <= 512**2
        assert 0.5 <= width / height <= 2
    with pytest.raises(ValueError, match=r"buckets=48 does not divide the resolution of 512"):
        bucket_sizes(512, 48)


def test_a_picture_goes_to_the_nearest_aspect_ratio() -> None:
    found = bucket_sizes(64, 8)
    assert nearest_bucket((100, 100), found) == (64, 64)
    assert nearest_bucket((4000, 10), found) == max(found, key=lambda size: size[0] / size[1])
    for shape in ((3, 2), (2, 3), (16, 9)):
        size = nearest_bucket(shape, found)
        own = [abs(np.log(w / h) - np.log(shape[0] / shape[1])) for w, h in found]
        assert abs(np.log(size[0] / size[1]) - np.log(shape[0] / shape[1])) == min(own)


def test_nearness_is_a_quotient_and_of_two_as_near_the_larger_is_chosen() -> None:
    halves = [(32, 64), (64, 64)]  # the geometric mean of 0.5 and 1 is 0.707, their mean 0.75
    assert nearest_bucket((73, 100), halves) == (64, 64)
    assert nearest_bucket((70, 100), halves) == (32, 64)
    assert nearest_bucket((5, 5), [(32, 32), (64, 64), (48, 48)]) == (64, 64)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photo_has_the_size_it_is_seen_with(orientation: int, tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (30, 20)), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as stored:
        seen = ImageOps.exif_transpose(stored).size
    assert upright_size(tmp_path / "a.jpg") == seen


def test_no_step_is_one_square_in_the_order_given() -> None:
    assert arrange([(9, 3), (3, 9)], 32, 0) == ([0, 1], [range(2)], [(32, 32)])


def test_a_batch_is_of_one_bucket_and_ranks_part_it() -> None:
    whole = plan()
    assert {bucket(whole.batch(step)[0].index) for step in range(120)} == set(range(4))
    for step in range(120):
        slots = whole.batch(step)
        assert len({bucket(slot.index) for slot in slots}) == 1
        assert [slot.place for slot in slots] == list(range(8))
        assert [slot.weight for slot in slots] == [1.0] * 8
        for ranks in (1, 2, 4, 8):
            parts = [whole.local(step, rank, ranks) for rank in range(ranks)]
            assert {len(part) for part in parts} == {8 // ranks}
            assert [slot for part in parts for slot in part] == slots
    forward = [whole.batch(step) for step in range(60)]
    assert [plan().batch(step) for step in reversed(range(60))] == forward[::-1]
    assert [plan(seed=4).batch(step) for step in range(60)] != forward


@pytest.mark.parametrize("batch_size", [2, 8, 128])
def test_after_an_epoch_each_sample_was_seen_as_often_as_there_were_epochs(batch_size: int) -> None:
    """But for what does not fill a batch of its bucket, which waits for the next epoch."""
    epochs = 12
    whole = plan(batch_size)
    steps = sum(epochs * held // batch_size for held in HELD)
    seen = Counter(slot.index for step in range(steps) for slot in whole.batch(step))
    for index in range(sum(HELD)):
        left_over = ceil(batch_size / HELD[bucket(index)])
        assert epochs - left_over <= seen[index] <= epochs, (index, seen[index])


def test_one_bucket_is_planned_as_a_square_is() -> None:
    square = StepPlan(((0, 7),), (1.0,), (1.0,), 3, 5)
    one = StepPlan(((0, 7),), (1.0,), (1.0,), 3, 5, (1,), ((48, 40),))
    assert [one.batch(step) for step in range(9)] == [square.batch(step) for step in range(9)]


def picture(seed: int, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """0.png to 8.png: wide, square and tall by turns; 0.png lies on its side."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(9):
        shape = ((60, 40), (40, 40), (40, 60))[i % 3]
        image, exif = picture(i, *shape), Image.Exif()
        if i == 0:
            image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.save(folder / f"{i}.png", exif=exif)
        (folder / f"{i}.txt").write_text(f"photo {i}")
    return folder


def needs(path: Path) -> Needs:
    return Needs(32, 4, lambda prompts, seed, guidance: (), path / "cache", lambda: "tiny")


def as_shards(photos: Path) -> Path:
    records = [
        (path.stem, {"png": path.read_bytes(), "txt": path.with_suffix(".txt").read_bytes()})
        for path in sorted(photos.glob("*.png"))
    ]
    write_shards(photos.parent / "shards", records, per_shard=4)
    return photos.parent / "shards"


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_sources_cut_each_picture_to_its_bucket(kind: str, photos: Path) -> None:
    assert upright_size(photos / "0.png") == (60, 40)
    source: Any = Folder(folder=photos, buckets=8)
    if kind == "shards":
        source = Shards(shards=as_shards(photos), buckets=8)
    train, _ = source.open(needs(photos.parent))
    assert [len(group) for group in train.groups] == [3, 3, 3]
    assert train.sizes == [(24, 40), (32, 32), (40, 24)]
    assert not train.fixed  # one array of latents has one size
    groups, sizes = tuple((g.start, g.stop) for g in train.groups), tuple(train.sizes)
    order = StepPlan(groups, train.shares, train.weights, 2, 1, train.frames, sizes)
    batches = Planned(train, order, None, 0, 1)
    shapes = Counter()
    for step in range(9):
        batch = batches[step]
        assert batch.pixels is not None
        shapes[tuple(batch.pixels.shape)] += 1
    assert shapes == {(2, 3, 40, 24): 3, (2, 3, 32, 32): 3, (2, 3, 24, 40): 3}
    halves = [Planned(train, order, None, rank, 2)[4] for rank in (0, 1)]
    assert [key for half in halves for key in half.keys] == batches[4].keys
    again = pickle.loads(pickle.dumps(batches))  # as for a worker
    assert [again[step].keys for step in range(9)] == [batches[step].keys for step in range(9)]
    assert [each.keys for each in loader(batches, 9, 5, 0)] == [
        batches[i].keys for i in range(5, 9)
    ]


def test_held_out_batches_are_of_one_size_and_miss_none(photos: Path) -> None:
    _, held_out = Folder(folder=photos, buckets=8, validation=5).open(needs(photos.parent))
    assert held_out is not None
    fixed = Fixed(held_out, 2, None)
    batches = [fixed[i] for i in range(len(fixed))]
    assert sorted(key for batch in batches for key in batch.keys) == [
        f"{i}.png" for i in range(4, 9)
    ]
    assert [len(batch.keys) for batch in batches] == [2, 2, 1]  # tall, square, wide


@pytest.mark.parametrize(("step", "says"), [(6, "multiples of 4 pixels"), (20, "does not divide")])
def test_steps_that_do_not_fit_are_refused(photos: Path, step: int, says: str) -> None:
    with pytest.raises(ValueError, match=rf"buckets={step}.*{says}"):
        Folder(folder=photos, buckets=step).open(needs(photos.parent))


def test_a_run_on_buckets(
    photos: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = (
        "data: {source: folder, folder: photos, buckets: 8, validation: 3}\n"
        "methods: {selective: {sites: cross, projections: [k, v]}}\n"
        "run: {steps: 4, batch_size: 2, resolution: 32, validate_every: 2, checkpoint_every: 0}\n"
        "tracker: none\n"
    )
    (tmp_path / "mine.yaml").write_text(recipe)
    assert main(["fit", "recipe=./mine.yaml", f"backbone={tiny_folder}", "run=out"]) == 0
    assert (tmp_path / "out" / "adapter.safetensors").is_file()


def test_the_size_of_a_format_that_is_not_read_is_refused(tmp_path: Path) -> None:
    """Whatever the file is called: what decodes rare formats has had faults."""
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    assert upright_size(tmp_path / "a.png") == (20, 30)
    Image.new("RGB", (20, 30)).save(tmp_path / "b.png", "PCX")
    with pytest.raises(ImageError, match="not a readable image"):
        upright_size(tmp_path / "b.png")


def test_a_source_and_its_options_cannot_be_wrong_later(photos: Path) -> None:
    with pytest.raises(ValidationError, match="buckets"):
        Folder(folder=photos, buckets=-8)
    assert Folder(folder=photos, buckets=0).buckets == 0
    source = Folder(folder=photos, buckets=8)
    with pytest.raises(ValidationError, match="frozen"):
        source.buckets = 16  # type: ignore[misc]
