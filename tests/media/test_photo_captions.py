"""Captions as people have them, which of several is meant, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.media.images import ImageError
from trainer.media.photo_captions import CaptionRules, Captions
from trainer.media.photo_listing import list_photos
from trainer.media.photo_report import found_in


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "10_dog/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    return tmp_path


def captions(folder: Path, **rules: Any) -> Captions:
    return Captions(list_photos(folder, recursive=True), CaptionRules(**rules))


def texts(folder: Path, name: str, **rules: Any) -> tuple[str, ...] | None:
    found = captions(folder, **rules).of(folder / name)
    return found and found.texts


def table(folder: Path, *rows: Any) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_each_kind_is_read(folder: Path) -> None:
    (folder / "a.caption").write_text(" a fox \n")
    table(folder, {"file_name": "b.png", "text": "a bé\u2028ar", "width": 20}, "")
    assert texts(folder, "a.png") == ("a fox",)
    assert texts(folder, "b.png") == ("a bé\u2028ar",)
    assert texts(folder, "10_dog/c.png") == ("dog",)
    assert texts(folder, "10_dog/c.png", subjects=False) is None
    (folder / "10_dog" / "c.txt").write_text("a dog")
    assert texts(folder, "10_dog/c.png") == ("a dog",)
    assert texts(folder, "10_dog/c.png", kind="folder") == ("dog",)
    assert texts(folder, "a.png", kind="txt") is None


def test_tables_name_photos_of_their_folder_and_may_give_several(folder: Path) -> None:
    table(folder, {"file_name": "10_dog/c.png", "caption": ["one", " two "]})
    assert texts(folder, "10_dog/c.png") == ("one", "two")
    table(folder / "10_dog", {"file_name": "c.png", "text": ["one", "two"]})
    assert texts(folder, "10_dog/c.png") == ("one", "two")


def test_lines_are_one_caption_unless_asked_for(folder: Path) -> None:
    (folder / "a.txt").write_text("a fox\r\n\n  a red fox\n")
    assert texts(folder, "a.png") == ("a fox\r\n\n  a red fox",)
    assert texts(folder, "a.png", lines=True) == ("a fox", "a red fox")
    (folder / "a.txt").write_text("\n \n")
    assert texts(folder, "a.png", lines=True) == ("",)


def test_two_that_differ_need_a_choice(folder: Path) -> None:
    (folder / "a.txt").write_text("a fox")
    (folder / "a.caption").write_text("a fox")
    assert texts(folder, "a.png") == ("a fox",)
    (folder / "a.caption").write_text("fox, red")
    with pytest.raises(
        ImageError,
        match=r"a\.txt and .*a\.caption give it different captions; keep one, or choose by "
        r"data\.caption_from=txt or data\.caption_from=caption",
    ):
        texts(folder, "a.png")
    assert texts(folder, "a.png", kind="caption") == ("fox, red",)
    (folder / "a.caption").unlink()
    table(folder, {"file_name": "a.png", "text": "another"})
    with pytest.raises(ImageError, match=r"a\.txt and .*metadata\.jsonl line 1 give it different"):
        texts(folder, "a.png")
    assert texts(folder, "a.png", kind="metadata") == ("another",)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["{"], r"metadata\.jsonl line 1: not JSON"),
        (["[1]"], "line 1: names no file; a line looks like"),
        (['{"text": "a"}'], "line 1: names no file"),
        ([{"file_name": "a.png"}], r"line 1: a\.png has no caption; give text \(or caption\)"),
        ([{"file_name": "a.png", "text": 3}], "has no caption"),
        ([{"file_name": "a.png", "text": []}], "has no caption"),
        ([{"file_name": "a.png", "text": "a", "caption": "b"}], "text and caption differ"),
        ([{"file_name": "a.png", "text": "a"}] * 2, r"line 2: a\.png is named a second time"),
        ([{"file_name": "q.png", "text": "a"}], r"there is no photo q\.png; add it"),
        ([{"file_name": "a_mask.png", "text": "a"}], r"a_mask\.png is a mask by its name"),
        ([{"file_name": "../x.png", "text": "a"}], r"there is no photo"),
    ],
)
def test_tables_that_cannot_be_used_are_named(folder: Path, rows: list[Any], says: str) -> None:
    Image.new("L", (20, 20), 255).save(folder / "a_mask.png")
    table(folder, *rows)
    with pytest.raises(ImageError, match=says):
        captions(folder)
    assert captions(folder, kind="txt").of(folder / "a.png") is None  # the table is not read


def test_a_row_of_a_photo_below_says_how_it_is_read(folder: Path) -> None:
    table(folder, {"file_name": "10_dog/c.png", "text": "a"})
    with pytest.raises(ImageError, match=r"10_dog/c\.png is not read.*data\.recursive=true reads"):
        Captions(list_photos(folder))


def test_what_was_found_is_counted(folder: Path) -> None:
    (folder / "a.txt").write_text("a fox\na red fox")
    table(folder, {"file_name": "b.png", "text": ["one", "two"]})
    Image.new("L", (20, 20), 255).save(folder / "a_mask.png")
    first, second = found_in(captions(folder), times=2)
    assert first == (
        f"{folder}: 3 photos; captions: 1 from folder names, 1 from .txt, 1 from metadata.jsonl ("
        "photos with several: 1); masks: 1; with repeats 24 an epoch (10_dog 20 times)"
    )
    assert "each read as one caption: 1; data.caption_lines=true" in second
    (only,) = found_in(captions(folder, lines=True))
    assert "(photos with several: 2)" in only
    (folder / "a.txt").unlink()
    assert "1 from a template" in found_in(captions(folder), template=True)[0]
    (folder / "metadata.jsonl").unlink()
    (folder / "10_dog" / "c.png").unlink()
    assert found_in(captions(folder)) == [f"{folder}: 2 photos; captions: none; masks: 1"]
