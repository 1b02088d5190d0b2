"""Reference pictures beside photos, by name and by metadata.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from trainer.data.source import Needs
from trainer.data.sources.folder import Folder
from trainer.media.images import ImageError
from trainer.media.photo_listing import list_photos
from trainer.media.reference_files import check_alike, reference_picture


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def test_they_are_found_by_name_in_their_order_and_are_no_photos(tmp_path: Path) -> None:
    photo = picture(tmp_path / "cat.png")
    second, first = picture(tmp_path / "Cat.ref2.png"), picture(tmp_path / "cat.REF.jpg")
    listing = list_photos(tmp_path)
    assert listing.photos == (photo,)
    assert listing.references == {photo: (first, second)}
    assert listing.stored() == sum(path.stat().st_size for path in (photo, first, second))


def test_they_are_found_in_metadata(tmp_path: Path) -> None:
    photo, own = picture(tmp_path / "cat.png"), picture(tmp_path / "more" / "own.png")
    line = {"file_name": "cat.png", "text": "a cat", "reference": "more/own.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    assert list_photos(tmp_path).references == {photo: (own,)}


@pytest.mark.parametrize("name", ["none.png", "../outside.png", 3])
def test_metadata_that_names_no_file_below_is_refused(tmp_path: Path, name: object) -> None:
    picture(tmp_path / "outside.png")
    picture(tmp_path / "in" / "cat.png")
    line = {"file_name": "cat.png", "text": "a cat", "reference": name}
    (tmp_path / "in" / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=r"line 1: there is no reference picture .* give its path"):
        list_photos(tmp_path / "in")


def test_one_without_its_photo_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "dog.ref.png")
    picture(tmp_path / "cat.png")
    with pytest.raises(ValueError, match=r"no photo dog is beside it"):
        list_photos(tmp_path)


def test_every_photo_has_as_many() -> None:
    photos = [Path("a.png"), Path("b.png")]
    assert check_alike(photos, {}) == 0
    with pytest.raises(ValueError, match=r"b.png: 0 reference pictures, and another photo has 1"):
        check_alike(photos, {photos[0]: (Path("a.ref.png"),)})


def test_one_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "cat.ref.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"cat.ref.png.*it is a reference picture"):
        reference_picture(tmp_path / "cat.ref.png", 8)


def test_a_folder_gives_them_to_its_samples(tmp_path: Path) -> None:
    picture(tmp_path / "photos" / "cat.png", "blue")
    picture(tmp_path / "photos" / "cat.ref.png", "white", (20, 60))
    source = Folder(folder=tmp_path / "photos", template="a cat")
    needs = Needs(16, 4, lambda *_: [], tmp_path / "cache", lambda: "")
    train, _ = source.open(needs)
    reference = train.reference(0)  # type: ignore[attr-defined]
    assert reference.shape == (1, 3, 16, 16) and torch.equal(reference, torch.ones(1, 3, 16, 16))
    before = train.identity()
    picture(tmp_path / "photos" / "cat.ref.png", "black", (20, 60))
    assert source.open(needs)[0].identity() != before
