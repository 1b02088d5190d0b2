"""Masks beside photos: whose they are, what they weigh, and what is no mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.media.mask_files import read_mask
from trainer.media.photo_folder import list_images, read_folder
from trainer.media.photo_listing import list_photos, unread

SIZE = (40, 30)


def photo(folder: Path, name: str) -> Path:
    Image.new("RGB", SIZE, (9, 99, 200)).save(folder / name)
    return folder / name


def half(mode: str = "L", size: tuple[int, int] = SIZE) -> Image.Image:
    """White on the left half, of any mode."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask if mode == "L" else mask.convert(mode)


@pytest.mark.parametrize(
    ("own", "mask"),
    [
        ("a.jpg", "a_mask.png"), ("a.png", "a-mask.png"), ("a.webp", "a.mask.png"),
        ("a.jpg", "a-masklabel.png"), ("a.jpg", "a_masklabel.png"), ("a.jpg", "A_MASK.PNG"),
        ("a.JPG", "a_mask.jpg"), ("a.jpg", "a mask.webp"), ("a.jpg", "a_masks.png"),
        ("a.jpg", "a_loss_mask.png"), ("a.jpg", "a-mask-label.png"), ("a.jpg", "a.jpg.mask.png"),
        ("a.jpg", "a.jpg_mask.png"), ("0.src.jpg", "0.mask.png"), ("a_b.jpg", "a_b_mask.png"),
        ("my mask.jpg", "my mask_mask.png"),
    ],
)  # fmt: skip
def test_names_of_masks(own: str, mask: str, tmp_path: Path) -> None:
    if own == "my mask.jpg":  # a photo that shows a mask needs another name
        photo(tmp_path, own)
        half().save(tmp_path / mask)
        with pytest.raises(ValueError, match=r"my mask.*a mask by its name, and no photo my is"):
            list_images(tmp_path)
        return
    there = photo(tmp_path, own)
    half().save(tmp_path / mask)
    photo(tmp_path, "other.png")
    assert list_images(tmp_path) == sorted([there, tmp_path / "other.png"])
    assert list_photos(tmp_path).masks == {there: tmp_path / mask}
    photos, skipped = read_folder(tmp_path)
    found = {each.path.name: each.mask for each in photos}
    assert found["other.png"] is None and not skipped
    grey = np.asarray(found[own])
    assert grey.shape == (30, 40) and grey[:, :19].min() > 240 and grey[:, 21:].max() < 15


def test_masks_without_a_photo_or_two_for_one_are_refused(tmp_path: Path) -> None:
    photo(tmp_path, "a.jpg")
    half().save(tmp_path / "b_mask.png")
    with pytest.raises(ValueError, match=r"b_mask\.png: a mask by its name, and no photo b is bes"):
        list_images(tmp_path)
    (tmp_path / "b_mask.png").rename(tmp_path / "a_mask.png")
    half().save(tmp_path / "a-masklabel.png")
    with pytest.raises(ValueError, match=r"a\.jpg: a.mask.*\.png and a.mask.*\.png are both its"):
        list_images(tmp_path)
    (tmp_path / "a-masklabel.png").rename(tmp_path / "a_mask_mask.png")
    with pytest.raises(ValueError, match=r"a_mask_mask\.png: .* no photo a_mask is beside it"):
        list_images(tmp_path)


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA", "P", "I;16", "LA"])
def test_masks_of_every_mode(mode: str, tmp_path: Path) -> None:
    if mode == "I;16":
        made = Image.fromarray(np.asarray(half()).astype(np.uint16) * 257)
    elif mode == "LA":  # drawn in white on nothing
        made = Image.merge("LA", [Image.new("L", SIZE, 255), half()])
    else:
        made = half(mode)
    made.save(tmp_path / "a_mask.png")
    grey = np.asarray(read_mask(tmp_path / "a_mask.png", SIZE))
    assert set(np.unique(grey)) == {0, 255}
    assert grey[:, :20].all() and not grey[:, 20:].any()


def test_grey_is_a_weight_and_painted_or_numbered_objects_count(tmp_path: Path) -> None:
    place = tmp_path / "a_mask.png"
    Image.new("L", SIZE, 127).save(place)
    assert set(np.unique(np.asarray(read_mask(place, SIZE)))) == {127}
    colours = Image.new("RGB", SIZE)
    colours.paste((0, 180, 90), (0, 0, 20, 30))
    colours.save(place)
    assert set(np.unique(np.asarray(read_mask(place, SIZE)))) == {0, 255}
    numbers = Image.new("L", SIZE)
    numbers.paste(2, (0, 0, 20, 30))
    numbers.save(place)
    assert set(np.unique(np.asarray(read_mask(place, SIZE)))) == {0, 255}
    half(size=(80, 60)).save(place)  # drawn over a larger copy
    assert read_mask(place, SIZE).size == SIZE


def test_masks_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    photo(tmp_path, "a.png")
    place = tmp_path / "a_mask.png"
    for made, says in (
        (half(size=(30, 40)), r"a_mask\.png: 30x40 pixels, and its photo has 40x30"),
        (Image.new("L", SIZE), r"a_mask\.png: all black, so nothing of its photo would"),
    ):
        made.save(place)
        with pytest.raises(ValueError, match=says):
            read_folder(tmp_path)
    place.write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"a_mask\.png: a GIF"):
        read_folder(tmp_path)
    photo(tmp_path, "b.png")
    photos, skipped = read_folder(tmp_path, "skip")
    assert [each.path.name for each in photos] == ["b.png"]
    assert [path.name for path, _ in skipped] == ["a.png"]


def test_what_is_not_read_is_said(tmp_path: Path) -> None:
    photo(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a")
    half().save(tmp_path / "a_mask.png")
    for name in (".DS_Store", "._a.png", "._a.txt", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    assert unread(list_photos(tmp_path)) == []
    (tmp_path / "a.json").write_text("a")
    (tmp_path / "b.txt").write_text("of no photo")
    (tmp_path / "masks").mkdir()
    (said,) = unread(list_photos(tmp_path))
    assert "not read: a.json, b.txt, masks/; captions are read from .txt and" in said
    for name in ("a_depth.png", "a-condlabel.png", "a_2.png", "a_mask1.png"):
        photo(tmp_path, name)
    assert (
        "trained on as photos: a-condlabel.png, a_depth.png, a_mask1.png;"
        in (unread(list_photos(tmp_path))[1])
    )
