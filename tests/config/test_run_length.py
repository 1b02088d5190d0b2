"""`run.epochs` beside `run.steps`: exactly one, and the steps that epochs take."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from faults.server import serve
from PIL import Image
from tars import pack

from trainer.config.load import load_recipe
from trainer.config.run_length import steps_of
from trainer.config.run_section import RunSpec
from trainer.config.schema import RecipeError
from trainer.data.source import Source
from trainer.data.sources import remote
from trainer.data.sources.concept import Concept
from trainer.data.sources.remote import Remote
from trainer.data.sources.shards import Shards
from trainer.data.sources.video import Video
from trainer.data.sources.world_clips import WorldClips
from trainer.data.tars.shard_checksums import build_manifest
from trainer.media.write_video import encode_video


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """lora_folder on 3 photos that count 10 times and 2 that count 3 times."""
    for name, count in (("10_dog", 3), ("3_cat", 2)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (32, 32)).save(tmp_path / name / f"{number}.png")
    return ["recipe=lora_folder", f"data.folder={tmp_path}"]


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        (["run.epochs=1"], 9),  # 36 samples, 4 at once
        (["run.epochs=3", "run.batch_size=8"], 14),  # 13.5
        (["run.epochs=0.5"], 5),
        (["run.epochs=2", "run.accumulate=2"], 9),
        (["run.epochs=1", "data.repeats=2"], 18),
        (["run.epochs=1", "data.validation=3"], 2),  # the last three are dogs: 6 samples are left
        (["run.epochs=0.001"], 1),
    ],
)
def test_epochs_become_steps(words: list[str], more: list[str], steps: int) -> None:
    recipe = load_recipe([*words, *more, "optim.warmup=0"])
    assert recipe.run.steps == steps == recipe.tree["run"]["steps"]
    assert "epochs" not in recipe.tree["run"]
    assert any(line.endswith(f"so run.steps={steps}") for line in recipe.said)


def test_one_of_both_is_given(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"run\.epochs=2 and run\.steps=9 both say how long"):
        load_recipe([*words, "run.epochs=2", "run.steps=9"])
    with pytest.raises(RecipeError, match=r"run\.epochs=0: "):
        load_recipe([*words, "run.epochs=0"])
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump({"base": "lora_folder", "run": {"epochs": 2}}))
    own = [f"recipe={mine}", words[1], "optim.warmup=0"]
    assert load_recipe(own).run.steps == 18  # its base says 1500 steps
    assert load_recipe([*own, "run.steps=7"]).run.steps == 7
    assert load_recipe([*own, "run.epochs=1"]).run.steps == 9


def test_a_warm_up_longer_than_the_epochs_is_refused(words: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"optim\.warmup=60 has no effect: the run has 9 steps"):
        load_recipe([*words, "run.epochs=1", "optim.warmup=60"])


def test_data_that_cannot_be_counted_are_refused(no_wait: None) -> None:
    with pytest.raises(RecipeError, match=r"run\.epochs: concepts learned in a row"):
        load_recipe(["recipe=c_lora", "run.epochs=2"])
    with pytest.raises(RecipeError, match=r"run\.epochs=2: data\.source=source does not know how"):
        steps_of(RunSpec(epochs=2), Source())
    server = Remote(url="http://127.0.0.1:9/none")
    with pytest.raises(RecipeError, match=r"run\.epochs=2: http://127\.0\.0\.1:9/none/manifest"):
        steps_of(RunSpec(epochs=2), server)


@pytest.fixture
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAIT", 0.0)


def photos(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({}, 2 * 7),  # one of eight is held out, and there are as many class images
        ({"validation": 0}, 2 * 8),
        ({"prior_weight": 0}, 7),
        ({"prior_images": 0}, 7),
        ({"validation": 3, "prior_weight": 0}, 5),
    ],
)
def test_an_epoch_of_a_concept_has_each_photo_once(
    options: dict[str, Any], samples: int, tmp_path: Path
) -> None:
    folder = photos(tmp_path / "cup", 8)
    assert Concept(concept=str(folder), class_word="cup", **options).epoch() == samples
    two = photos(tmp_path / "dog", 4)
    many = Concept(
        concept=[str(folder), str(two)], token=["<a>", "<b>"], class_word=["cup", "dog"], **options
    )
    if not options:
        assert many.epoch() == 2 * (7 + 4)
    assert Concept(concept="sprite:fox", prior_weight=0).epoch() == 5


def shard(path: Path, first: int, count: int, video: bytes | None = None) -> None:
    """Samples, and one that has no picture."""
    picture = BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "PNG")
    media = ("png", picture.getvalue()) if video is None else ("mp4", video)
    members: list[tuple[str, bytes]] = [(f"x{first}.txt", b"none")]
    for number in range(first, first + count):
        members += [(f"{number}.{media[0]}", media[1]), (f"{number}.txt", b"a fox")]
    pack(path, *members)


def test_shards_are_counted_by_their_manifest_or_by_names(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", 0, 5)
    shard(tmp_path / "b.tar", 5, 4)
    source = Shards(shards=tmp_path, on_bad="skip", validation=2)
    assert source.epoch() == 7
    assert not (tmp_path / "manifest.json").exists()  # nothing was decoded
    build_manifest(tmp_path, tmp_path / "cache")
    assert Shards(shards=tmp_path, on_bad="skip", validation=2).epoch() == 7
    assert Shards(shards=tmp_path / "b.tar", on_bad="skip").epoch() == 4
    words = ["recipe=lora_folder", "data.source=shards", f"data.shards={tmp_path}",
             "data.folder=null", "data.on_bad=skip", "run.epochs=3", "optim.warmup=0"]  # fmt: skip
    assert load_recipe(words).run.steps == 7  # 27 samples, 4 at once
    with serve(tmp_path) as url:
        assert Remote(url=url, validation=1).epoch() == 8
        server = Remote(url=f"{url}/{{a,b}}.tar")
        assert server.epoch() == 9
    assert server.epoch() == 9  # its manifest was fetched once
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:900])
    with pytest.raises(RecipeError, match=r"run\.epochs=1: .*a\.tar: truncated"):
        steps_of(RunSpec(epochs=1), Shards(shards=cut))


def test_videos_are_counted_beside_the_share_of_images(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    for number in range(6):
        (tmp_path / "clips" / f"{number}.mp4").write_bytes(b"not read")
    clips = {"video": tmp_path / "clips", "prompt": "a fox", "frames": 2}
    assert Video(**clips, validation=1).epoch() == 5
    assert Video(**clips, images=0.25).epoch() == 8
    shard(tmp_path / "a.tar", 0, 3, encode_video(frames, 8))
    assert Video(video=tmp_path / "a.tar", frames=2, images=0.5).epoch() == 6
    assert WorldClips(count=30, images=0.25).epoch() == 40
    assert load_recipe(["recipe=linear_swap", "data.count=160", "run.epochs=2"]).run.steps == 20
