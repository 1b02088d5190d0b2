"""`sample reference=photo.png`: reference pictures for a model that reads them, how much and where
each counts, and again from the file that was made."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.__main__ import main
from trainer.common.exit_codes import BAD_RECIPE
from trainer.media.made_by import facts_in


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        Image.new("RGB", (48, 32), colour).save(f"{name}.png")
    left = Image.new("L", (32, 32))
    left.paste(255, (0, 0, 16, 32))
    left.save("left.png")
    Image.new("L", (32, 16), 255).save("wide.png")


@pytest.fixture
def adapter(tiny_folder: Path, save_trained_on: Callable[..., Path]) -> Path:
    path: Path = save_trained_on(tiny_folder, {"ip_adapter": {}}, "model")
    return path


def made(*words: str) -> np.ndarray:
    assert main(["sample", "prompt=a fox", "steps=2", *words]) == 0
    out = next(word.removeprefix("out=") for word in words if word.startswith("out="))
    with Image.open(next(Path(out).glob("*.png"))) as picture:
        return np.asarray(picture.convert("RGB"))


def test_it_counts_as_much_as_asked(adapter: Path) -> None:
    given = f"adapter={adapter}"
    plain = made(given, "out=plain")
    assert np.array_equal(made(given, "reference=red.png", "reference_scale=0", "out=zero"), plain)
    red = made(given, "reference=red.png", "out=red")
    assert not np.array_equal(red, plain)
    assert not np.array_equal(made(given, "reference=blue.png", "out=blue"), red)
    alone = made(given, "reference=red.png", "condition_guidance=1", "out=alone")
    assert not np.array_equal(alone, red)


def test_several_count_where_their_masks_are_white(adapter: Path) -> None:
    words = (f"adapter={adapter}", "reference=[red.png,blue.png]")
    both = made(*words, "out=both")
    masked = made(*words, "reference_mask=[left.png,left.png]", "out=masked")
    assert not np.array_equal(both, masked)


def test_it_is_made_again(adapter: Path, capsys: Any) -> None:
    words = ("reference=[red.png,blue.png]", "reference_scale=0.5", "condition_guidance=2")
    made(f"adapter={adapter}", *words, "out=one")
    path = next(Path("one").glob("*.png"))
    found = facts_in(path)
    assert found["reference"] == ["red.png", "blue.png"] and found["reference_scale"] == 0.5
    capsys.readouterr()
    assert main(["sample", f"from={path}", "out=two"]) == 0
    assert "repeated, bit for bit" in capsys.readouterr().err
    Image.new("RGB", (9, 9)).save("blue.png")
    assert main(["sample", f"from={path}", "out=three"]) == BAD_RECIPE
    assert "blue.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["reference=none.png"], "none.png"),
        (["reference=notes.txt"], "notes.txt"),
        (["reference=red.png", "reference_mask=[left.png,left.png]"], "2 masks for 1 reference"),
        (["reference=red.png", "reference_mask=wide.png"], "32x16 pixels, and the picture has"),
        (["reference_scale=0.5"], "reference_scale=0.5 has no effect: .* give reference= too"),
        (["condition_guidance=2"], "condition_guidance=2 has no effect"),
        (["reference=red.png", "guidance=1", "condition_guidance=2"], "give guidance above 1 too"),
        (["reference=red.png", "reference_scale=-1"], "reference_scale"),
    ],
)
def test_bad_input_is_refused(adapter: Path, capsys: Any, words: list[str], why: str) -> None:
    Path("notes.txt").write_text("no picture")
    line = ["sample", f"adapter={adapter}", "prompt=a fox", "steps=1", *words]
    assert main(line) == BAD_RECIPE
    error = capsys.readouterr().err
    assert re.search(why, error), error


@pytest.mark.parametrize("word", ["reference_scale=0.5", "reference_mask=left.png"])
def test_what_a_method_does_not_read_is_refused(
    word: str, tiny_folder: Path, save_trained_on: Callable[..., Path], capsys: Any
) -> None:
    given = save_trained_on(tiny_folder, {"pva": {"depth": 1, "heads": 1, "inner": 16}}, "pva")
    words = [f"adapter={given}", "prompt=a fox", "steps=1", "reference=red.png"]
    assert main(["sample", *words, word]) == BAD_RECIPE
    name = word.partition("=")[0]
    assert f"{name} has no effect: this model reads reference" in capsys.readouterr().err
    assert main(["sample", *words, "out=made"]) == 0


def test_a_model_that_reads_none_is_refused(tiny_folder: Path, capsys: Any) -> None:
    words = [f"backbone={tiny_folder}", "prompt=a fox", "reference=red.png"]
    assert main(["sample", *words]) == BAD_RECIPE
    assert "this model reads no reference picture; give an adapter" in capsys.readouterr().err
