"""Previews inside a page: small, of every step that fits, and none that cannot be read."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import pytest
from made_runs import HOSTILE, previews
from PIL import Image

from trainer.runs.page import shown_previews
from trainer.runs.page.shown_previews import CLIP_SIDE, FRAMES, SIDE, previews_of


def opened(address: str) -> Image.Image:
    start = "data:image/webp;base64,"
    assert address.startswith(start)
    return Image.open(io.BytesIO(base64.b64decode(address.removeprefix(start))))


def test_each_prompt_has_its_pictures_by_step(tmp_path: Path) -> None:
    previews(tmp_path, (0, 10, 200))
    found = previews_of(tmp_path)
    assert [each.prompt for each in found.prompts] == ["a fox", HOSTILE]
    assert found.steps == [10, 200] and found.note == ""
    first, second = found.prompts
    assert list(first.pictures) == [0, 10, 200] and list(first.maps) == [10, 200]
    assert first.words == "a, fox"
    assert opened(first.pictures[10]).convert("RGB").getpixel((3, 3)) == (10, 0, 9)
    assert opened(second.pictures[200]).convert("RGB").getpixel((3, 3)) == (200, 80, 9)


def test_large_pictures_are_made_small_and_a_changed_one_is_read_again(tmp_path: Path) -> None:
    previews(tmp_path, (5,), side=800, prompts=1)
    before = previews_of(tmp_path).prompts[0].pictures[5]
    assert opened(before).size == (SIDE, SIDE)
    path = tmp_path / "previews" / "step-000005" / "00-a-fox.png"
    Image.new("RGB", (400, 800), "white").save(path)
    os.utime(path, ns=(1, 1))
    assert opened(previews_of(tmp_path).prompts[0].pictures[5]).size == (SIDE // 2, SIDE)


def test_too_many_are_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    previews(tmp_path, range(0, 90, 10), prompts=9)
    monkeypatch.setattr(shown_previews, "BYTES", 8_000)
    found = previews_of(tmp_path)
    assert len(found.prompts) == 8 and found.steps[-1] == 80 and 0 in found.prompts[0].pictures
    shown = len(found.steps) + 1
    assert 1 < shown < 9
    assert found.note == (
        f"{shown} of 9 steps are shown, so that the page stays small; 8 of 9 prompts are shown"
    )


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    previews(tmp_path, (0, 10), prompts=1)
    place = tmp_path / "previews" / "step-000010"
    (place / "00-a-fox.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    (place / "01-other.png").write_text("no picture")
    (place / "notes.png").write_text("not numbered")
    found = previews_of(tmp_path)
    assert [list(each.pictures) for each in found.prompts] == [[0]] and found.steps == []
    assert previews_of(tmp_path / "none").prompts == []


def test_a_clip_plays_as_long_as_it_is(tmp_path: Path) -> None:
    place = tmp_path / "previews" / "step-000010"
    place.mkdir(parents=True)
    frames = [Image.new("RGB", (200, 100), (i * 6, 0, 0)) for i in range(40)]
    frames[0].save(place / "00-a-run.gif", save_all=True, append_images=frames[1:], duration=50)
    (each,) = previews_of(tmp_path).prompts
    assert each.prompt == "a run"
    clip = opened(each.pictures[10])
    assert clip.size == (CLIP_SIDE, CLIP_SIDE // 2) and clip.n_frames == FRAMES  # type: ignore[attr-defined]
    clip.seek(1)
    clip.load()
    assert clip.info["duration"] == pytest.approx(40 * 50 / FRAMES, abs=1)
