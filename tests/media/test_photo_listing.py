"""Folders of photos as people have them: which files are photos, in which order, how often each."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from trainer.media.photo_listing import list_photos, unread


def made(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(path)


def names(folder: Path, recursive: bool = False) -> list[str]:
    listing = list_photos(folder, recursive)
    return [listing.name(path) for path in listing.photos]


def test_subfolders_are_read_on_request_in_natural_order(tmp_path: Path) -> None:
    made(tmp_path, ["b.png", "10/a.png", "2/a.png", "2/deep/c.png", ".hidden/d.png", "z.png"])
    assert names(tmp_path) == ["b.png", "z.png"]
    (said,) = unread(list_photos(tmp_path))
    assert "not read: 2/, 10/;" in said and "data.recursive=true" in said
    assert names(tmp_path, True) == ["2/a.png", "2/deep/c.png", "10/a.png", "b.png", "z.png"]
    assert unread(list_photos(tmp_path, True)) == []


@pytest.mark.parametrize(
    "left", ["@eaDir/b.png", "#recycle/b.png", "$RECYCLE.BIN/b.png", "lost+found/b.png"]
)
def test_what_file_servers_and_windows_leave_is_no_photo(left: str, tmp_path: Path) -> None:
    made(tmp_path, ["a.png", left])
    assert names(tmp_path, True) == ["a.png"]
    assert unread(list_photos(tmp_path)) == []


def test_folders_with_a_number_are_read_by_themselves(tmp_path: Path) -> None:
    made(tmp_path, ["10_sks dog/1.png", "10_sks dog/2.png", "3_cat/1.png", "old/1.png"])
    listing = list_photos(tmp_path)
    found = {listing.name(p): (listing.repeats(p), listing.subject(p)) for p in listing.photos}
    assert found == {
        "3_cat/1.png": (3, "cat"),
        "10_sks dog/1.png": (10, "sks dog"),
        "10_sks dog/2.png": (10, "sks dog"),
    }
    assert "not read: old/;" in unread(listing)[0]
    deeper = list_photos(tmp_path, True)
    assert [deeper.repeats(path) for path in deeper.photos] == [3, 10, 10, 1]


def test_beside_photos_of_the_folder_itself_they_are_not_read(tmp_path: Path) -> None:
    made(tmp_path, ["a.png", "10_dog/1.png"])
    assert names(tmp_path) == ["a.png"]
    assert "not read: 10_dog/;" in unread(list_photos(tmp_path))[0]


@pytest.mark.parametrize("name", ["2024_holiday", "20240512_beach", "0_dog", "dog_10", "10_", "10"])
def test_dates_and_other_names_are_no_repeats(tmp_path: Path, name: str) -> None:
    made(tmp_path, [f"{name}/1.png"])
    (photo,) = (listing := list_photos(tmp_path, True)).photos
    assert (listing.repeats(photo), listing.subject(photo)) == (1, None)
    with pytest.raises(ValueError, match=r"no image in this folder.*without data\.recursive=true"):
        list_photos(tmp_path)


def test_masks_are_those_of_their_own_folder(tmp_path: Path) -> None:
    made(tmp_path, ["1_a/x.png", "1_a/x_mask.png", "1_b/x.png"])
    listing = list_photos(tmp_path)
    assert names(tmp_path) == ["1_a/x.png", "1_b/x.png"]
    assert listing.masks == {tmp_path / "1_a/x.png": tmp_path / "1_a/x_mask.png"}


def test_a_link_to_a_folder_above_is_not_followed(tmp_path: Path) -> None:
    made(tmp_path, ["in/a.png"])
    os.symlink(tmp_path, tmp_path / "in" / "up")
    assert names(tmp_path, True) == ["in/a.png"]


MADE = """
cat-condlabel cat_depth cat_normal_map cat_canny_edges cat_openpose_image cat_seg_2 cat-cutout
cat_nobg cat.lineart catmask cat(mask) catdepth0 mask_cat depth-cat cat_mask_01 masks/cat
conditioning_images/cat depth_map/cat
"""


@pytest.mark.parametrize("name", MADE.split())
def test_what_is_made_from_a_photo_is_said(name: str, tmp_path: Path) -> None:
    """It is trained on all the same: its name may mean something else."""
    made(tmp_path, ["img/cat.jpg", f"{name}.png" if "/" in name else f"img/{name}.png"])
    listing = list_photos(tmp_path, True)
    assert len(listing.photos) == 2
    (said,) = unread(listing)
    assert f"trained on as photos: {'' if '/' in name else 'img/'}{name}.png; move them" in said


def test_names_that_say_nothing_are_not_said(tmp_path: Path) -> None:
    made(tmp_path, ["cat.jpg", "cat_2.jpg", "cat (1).jpg", "cat_beach.jpg", "pose.png", "mask.png"])
    made(
        tmp_path,
        ["depth/deep.png", "catalpha/x.png", "day/cat.jpg", "posed_cat.png", "cat_maskara_off.jpg"],
    )
    assert unread(list_photos(tmp_path, True)) == []
