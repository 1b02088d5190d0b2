"""What is counted of captions that lie inside tars, here or on a server, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.server import serve
from PIL import Image
from tars import pack

from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError
from trainer.data.source import Needs
from trainer.data.tars.shard_checksums import build_manifest
from trainer.media.write_video import encode_video
from trainer.methods.apply import apply_methods
from trainer.training import caption_check
from trainer.training.caption_check import check_captions

CONCEPT = ("concept", "prior_images", "prior_steps", "augment", "class_word", "prior_prompts",
           "prior_guidance")  # fmt: skip
LONG = "a fox on a blue background " * 9


@pytest.fixture
def counted(
    tiny_folder: Path, open_folder: Callable[[Path], Any], tmp_path: Path
) -> Callable[..., list[str]]:
    """`counted(word, *words)`: what is said of the captions of a recipe that trains this word, or
    none."""

    def said(word: str | None, *words: str) -> list[str]:
        method = (
            ["methods.new_token=null"] if word is None else [f"methods.new_token.tokens=[{word}]"]
        )
        nulls = [f"data.{key}=null" for key in CONCEPT]
        common = ["recipe=lora", f"backbone={tiny_folder}", "preview.every=0"]
        recipe = load_recipe([*common, *method, *nulls, *words])
        model = open_folder(tiny_folder)
        apply_methods(model, recipe.methods)
        needs = Needs(32, 4, lambda *_: (), tmp_path / "cache", lambda: "tiny")
        return check_captions(recipe, lambda: model.prompts.reader, recipe.data.open(needs)[0])

    return said


def shards(folder: Path, captions: list[str], media: tuple[str, bytes] | None = None) -> Path:
    folder.mkdir()
    picture = BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "PNG")
    end, data = media or ("png", picture.getvalue())
    members = [
        member
        for number, text in enumerate(captions)
        for member in ((f"{number}.{end}", data), (f"{number}.txt", text.encode()))
    ]
    pack(folder / "a.tar", *members)
    return folder


def test_shards_of_this_machine(counted: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """All where a new word trains; some of them without."""
    monkeypatch.setattr(caption_check, "FROM_HERE", 2)
    here = shards(tmp_path / "here", ["a zwx", "a fox", LONG, "a zwx here"])
    words = ("data.source=shards", f"data.shards={here}")
    first, long = counted("zwx", *words)
    assert first.startswith("captions: 4, 2 with zwx; the longest has 54 tokens")
    assert "longer than the 30 tokens that are read: a.tar: 2 (54 tokens)" in long
    first, said = counted(None, *words)
    assert first.startswith("captions: 2; the longest has ")
    assert said == "captions in shards: the first 2 of 4 were counted"
    with pytest.raises(RecipeError, match=r"zwy is in none of 4 captions"):
        counted("zwy", *words)


def test_shards_of_a_server(counted: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A few, each a request; a word may be in those that were not looked at."""
    monkeypatch.setattr(caption_check, "FROM_SERVER", 3)
    there = shards(tmp_path / "there", ["a fox", LONG, "a dog", "a zwx", "a zwxcat"])
    build_manifest(there, tmp_path / "cache")
    with serve(there) as url:
        words = ("data.source=remote", f"data.url={url}")
        first, long, said = counted("zwx", *words)
        assert first.startswith("captions: 3; the longest has 54 tokens of 30")
        assert "a.tar: 1 (54 tokens)" in long
        assert said == ("captions in shards: the first 3 of 5 were counted; zwx in none of these")
        monkeypatch.setattr(caption_check, "FROM_SERVER", 64)
        with pytest.raises(RecipeError, match=r"a\.tar: 4: the caption has zwx only"):
            counted("zwx", *words)


def test_videos_in_tars(counted: Any, tmp_path: Path) -> None:
    clip = encode_video(np.zeros((3, 32, 32, 3), np.uint8), 8)
    tars = shards(tmp_path / "clips", ["a zwx", LONG, "a fox"], ("mp4", clip))
    words = ("data.source=video", f"data.video={tars}", "data.frames=2", "run.batch_size=1")
    first, long = counted("zwx", *words)
    assert first.startswith("captions: 3, 1 with zwx; the longest has 54 tokens of 30")
    assert "1 (54 tokens)" in long
    with pytest.raises(RecipeError, match="zwy is in none of 3 captions"):
        counted("zwy", *words)
    # one caption for all is counted where the recipe is read
    assert counted("zwx", *words, "data.prompt=a zwx that walks") == []


def test_captions_of_stills_are_counted_too(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "stills").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "stills" / "a.png")
    (tmp_path / "stills" / "a.txt").write_text(LONG)
    clip = tmp_path / "a.mp4"
    clip.write_bytes(encode_video(np.zeros((3, 32, 32, 3), np.uint8), 8))
    words = ["recipe=tune_a_video", f"backbone={tiny_folder}", f"data.video={clip}",
             "data.prompt=a fox", "data.images=0.5",
             f"data.stills={tmp_path / 'stills'}"]  # fmt: skip
    said = load_recipe(words).said
    assert any(line.startswith("captions: 2; the longest has 54 tokens") for line in said)
