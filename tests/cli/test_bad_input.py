"""Bad input through the real command: one clear error, a code that is not 0, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from trainer.__main__ import main

PHOTOS = (
    "recipe=custom_diffusion", "data.concept=photos", "data.class_word=animal",
    "data.prior_weight=0", "tracker=none",
)  # fmt: skip


def _photo(folder: Path, name: str = "a.jpg") -> Path:
    path = folder / name
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    return path


def _truncated(folder: Path) -> None:
    path = _photo(folder)
    path.write_bytes(path.read_bytes()[:600])


def _pixel(folder: Path) -> None:
    Image.new("RGB", (1, 1)).save(folder / "a.png")


def _bomb(folder: Path) -> None:
    Image.new("1", (9000, 9000)).save(folder / "a.png")


def _animated(folder: Path) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])


def _latin(folder: Path) -> None:
    _photo(folder)
    (folder / "a.txt").write_bytes("a <v1> in a café".encode("latin-1"))


def _tokenless(folder: Path) -> None:
    _photo(folder)
    (folder / "a.txt").write_text("a dog on a beach")


def _text(folder: Path) -> None:
    (folder / "a.jpg").write_text("not a picture")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: None, "no image"),
        (_truncated, "a.jpg"),
        (_pixel, "1x1"),
        (_bomb, "pixels"),
        (_animated, "anima"),
        (_latin, "UTF-8"),
        (_tokenless, "must contain the token <v1>"),
        (_text, "a.jpg"),
    ],
    ids=["empty", "truncated", "1x1", "bomb", "gif", "latin-1", "no-token", "text"],
)
def test_bad_photos(
    spoil: Callable[[Path], None],
    says: str,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    spoil(photos)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRAINER_RUN_ID", raising=False)
    assert main(["fit", *PHOTOS, f"backbone={tiny_folder}", "run.id=bad"]) == 78
    captured = capsys.readouterr()
    assert "error: " in captured.err
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("backbone=./nowhere", "neither a backbone of ours nor a folder"),
        ("backbone=sd155", "did you mean sd15?"),
        ("data.concept=sprite:pengin", "no sprite is called pengin"),
        ("data.prior_folder=./nowhere", "nowhere"),
    ],
    ids=["missing-backbone", "misspelt-backbone", "misspelt-sprite", "missing-prior"],
)
def test_bad_names(word: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "recipe=custom_diffusion", word]) == 78
    assert says in capsys.readouterr().err


def test_bad_photos_are_skipped_by_name_where_the_recipe_allows(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    _photo(photos, "good.jpg")
    _text(photos)
    monkeypatch.chdir(tmp_path)
    words = [
        *PHOTOS,
        f"backbone={tiny_folder}",
        "data.on_bad=skip",
        "preview.every=0",
        "run.id=skips",
        "run.steps=1",
        "run.batch_size=2",
        "run.validate_every=0",
    ]
    assert main(["fit", *words]) == 0
    assert "skipped a.jpg" in capsys.readouterr().err
    assert list(tmp_path.rglob("adapter.safetensors"))
