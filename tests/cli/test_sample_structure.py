"""`sample structure=clip.gif`: the structure of a clip for a model that reads it, at a level, and
again from the file that was made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.__main__ import main
from trainer.common.exit_codes import BAD_RECIPE
from trainer.media.made_by import facts_in
from trainer.media.write_video import write_clip

DATA = {"source": "world_clips", "frames": 3}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def adapter(tiny_folder: Path, save_trained_on: Callable[..., Path]) -> Path:
    """Of a model that reads structure, whose weights are far from zero."""
    methods = {"gen1": {"heads": 2, "structure": 2}}
    path: Path = save_trained_on(tiny_folder, methods, "model", data=DATA)
    return path


def clip(name: str, grey: bool) -> Path:
    """Three frames of a square that moves to the right, on blue or on black."""
    frames = torch.full((3, 3, 32, 32), -1.0)
    if not grey:
        frames[:, 2] = 1.0
    for number in range(3):
        frames[number, :, 8:24, 4 + 8 * number : 12 + 8 * number] = 1.0
    return next(path for path in write_clip(frames, Path(name), 8.0) if path.suffix == ".gif")


def made(*words: str) -> np.ndarray:
    assert main(["sample", "prompt=a fox", "steps=2", *words]) == 0
    out = next(word.removeprefix("out=") for word in words if word.startswith("out="))
    with Image.open(next(Path(out).glob("*.gif"))) as film:
        return np.asarray(film.convert("RGB"))


def test_it_is_read_at_its_level(adapter: Path, capsys: Any) -> None:
    film, words = clip("square", grey=False), [f"adapter={adapter}"]
    plain = made(*words, "out=plain")
    fine = made(*words, f"structure={film}", "out=fine")
    assert "structure=square.gif: depth is guessed, what differs from" in capsys.readouterr().err
    coarse = made(*words, f"structure={film}", "structure_level=2", "out=coarse")
    assert not np.array_equal(fine, plain) and not np.array_equal(coarse, fine)
    depth = clip("depth", grey=True)
    made(*words, f"structure={depth}", "out=depth")
    assert "depth.gif: it is grey, and read as depth, bright is near" in capsys.readouterr().err
    found = facts_in(next(Path("coarse").glob("*.gif")))
    assert (found["structure"], found["structure_level"]) == ("square.gif", 2)


def test_it_is_made_again(adapter: Path, capsys: Any) -> None:
    film = clip("square", grey=False)
    words = (f"structure={film}", "structure_level=1", "temporal_guidance=1.5")
    one = made(f"adapter={adapter}", *words, "count=2", "out=one")
    assert one.any()
    capsys.readouterr()
    for path in sorted(Path("one").glob("*.gif")):
        assert facts_in(path)["temporal_guidance"] == 1.5
        assert main(["sample", f"from={path}", "out=two"]) == 0
        assert "repeated, bit for bit" in capsys.readouterr().err


def test_a_level_that_was_not_trained_is_refused(adapter: Path, capsys: Any) -> None:
    film = clip("square", grey=False)
    words = [f"adapter={adapter}", "prompt=a fox", f"structure={film}", "structure_level=3"]
    assert main(["sample", *words]) == BAD_RECIPE
    assert "structure_level=3: this model has learned levels from 0" in capsys.readouterr().err


def test_a_model_that_reads_none_is_refused(tiny_folder: Path, capsys: Any) -> None:
    words = [f"backbone={tiny_folder}", "frames=3", "prompt=a fox"]
    assert main(["sample", *words, f"structure={clip('square', grey=False)}"]) == BAD_RECIPE
    assert "square.gif: this model reads no structure; give an adapter" in capsys.readouterr().err


def test_a_source_is_inverted_with_the_structure(adapter: Path) -> None:
    film, depth = clip("square", grey=False), clip("depth", grey=True)
    words = (f"adapter={adapter}", f"source={film}")
    plain = made(*words, "out=plain")
    both = made(*words, f"structure={depth}", "out=both")
    assert not np.array_equal(both, plain)


def test_guidance_in_time_changes_a_clip(adapter: Path) -> None:
    plain, guided = (
        made(f"adapter={adapter}", f"temporal_guidance={scale}", f"out=at{scale}")
        for scale in (1, 3)
    )
    assert not np.array_equal(plain, guided)


def test_a_picture_has_no_structure_of_a_clip(adapter: Path, capsys: Any) -> None:
    film = clip("square", grey=False)
    words = [f"adapter={adapter}", "prompt=a fox", f"structure={film}", "image=a.png"]
    assert main(["sample", *words]) == BAD_RECIPE
    assert "image= begins a picture, and structure= is of a clip" in capsys.readouterr().err
