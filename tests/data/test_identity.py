"""What a data set is by the names of its samples: it changes with every byte that is trained on,
and with nothing else; and a sample's name is known without reading it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.data.identity import by_name, changed_samples, identity_of
from trainer.data.mixed import Mixed, Stills
from trainer.data.source import Generation, Needs, Source
from trainer.data.tars.write_shards import write_world
from trainer.data.video_clips import CaptionedVideo, VideoClips, Window


def needs(path: Path, colour: str = "red", generator: str = "tiny") -> Needs:
    def generate(prompts: Sequence[str], seed: int, how: Generation) -> list[Image.Image]:
        return [Image.new("RGB", (32, 32), colour) for _ in prompts]

    return Needs(32, 4, generate, path / f"cache-{colour}", lambda: generator)


def opened(source: str, where: Needs, **options: Any) -> tuple[Any, Any]:
    return Source.find(source)(**options).open(where)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "dog"
    folder.mkdir()
    for number in range(3):
        Image.effect_noise((40, 32), 40 + number).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a <v1> number {number}")
    return folder


def every_source(tmp_path: Path, photos: Path) -> dict[str, Any]:
    if not (tmp_path / "world").exists():
        write_world(tmp_path / "world", 6, seed=3, per_shard=4)
    where, word = needs(tmp_path), {"class_word": "dog", "prior_images": 2}
    return {
        "concept": opened("concept", where, concept=str(photos), **word),
        "folder": opened("folder", where, folder=photos, validation=1),
        "shards": opened("shards", where, shards=tmp_path / "world", validation=1),
        "world": opened("world", where, count=4, validation=2),
        "world_clips": opened("world_clips", where, count=4, frames=3, images=0.5, validation=2),
    }


def test_keys_are_those_of_the_samples_and_identities_are_repeatable(
    tmp_path: Path, photos: Path
) -> None:
    again = every_source(tmp_path, photos)
    for source, (train, held_out) in every_source(tmp_path, photos).items():
        for data in filter(None, (train, held_out)):
            rng = np.random.default_rng(0)
            keys = [data.sample(index, rng).key for index in range(len(data))]
            assert [data.key(index) for index in range(len(data))] == keys, source
        assert identity_of(train, held_out) == identity_of(*again[source]), source
        if held_out is not None:
            assert any(name.startswith("held out: ") for name in identity_of(train, held_out))


def masked(folder: Path) -> None:
    Image.new("L", (40, 32), 255).save(folder / "1.mask.png")


def other_mask(folder: Path) -> None:
    mask = Image.new("L", (40, 32), 255)
    mask.paste(0, (0, 0, 20, 32))
    mask.save(folder / "1.mask.png")


@pytest.mark.parametrize("source", ["concept", "folder"])
def test_a_mask_is_part_of_its_photo(source: str, tmp_path: Path, photos: Path) -> None:
    found = []
    own = {"concept": str(photos), "class_word": None, "prior_weight": 0}
    options = own if source == "concept" else {}
    for change in (masked, other_mask, None):
        if change is not None:
            change(photos)
        chosen = options or {"folder": photos}
        found.append(opened(source, needs(tmp_path), **chosen)[0].identity())
    assert changed_samples(found[0], found[1]) == ["the mask of 1.png has changed"]
    assert changed_samples(found[1], found[2]) == []


def test_photos_of_two_concepts_have_their_folders_in_their_names(
    tmp_path: Path, photos: Path
) -> None:
    shutil.copytree(photos, tmp_path / "cat")
    for path in (tmp_path / "cat").glob("*.txt"):
        path.write_text("a <v2>")
    both = {"concept": (str(photos), str(tmp_path / "cat")), "token": ("<v1>", "<v2>")}
    train, _ = opened("concept", needs(tmp_path), **both, class_word=None, prior_weight=0)
    assert list(train.identity()) == [
        f"{name}/{i}.png" for name in ("dog", "cat") for i in range(3)
    ]


def test_class_images_are_what_they_were_made_of(tmp_path: Path, photos: Path) -> None:
    """Another machine makes other last bits of the same picture; other steps make another one."""

    def identity(colour: str = "red", generator: str = "tiny", **options: Any) -> dict[str, str]:
        chosen = {"concept": str(photos), "class_word": "dog", "prior_images": 2, **options}
        found: dict[str, str] = opened("concept", needs(tmp_path, colour, generator), **chosen)[
            0
        ].identity()
        return found

    whole = identity()
    assert [name for name in whole if "prior" in name] == ["prior-0", "prior-1"]
    assert identity("blue") == whole
    others = [{"prior_steps": 3}, {"prior_guidance": 1.5}, {"prior_seed": 4}]
    for changed in (*(identity(**each) for each in others), identity(generator="other weights")):
        assert changed_samples(whole, changed) == [f"prior-{i} was rewritten" for i in range(2)]


def test_shards_are_known_by_their_checksums(tmp_path: Path) -> None:
    def identity(**options: Any) -> dict[str, str]:
        return identity_of(*opened("shards", needs(tmp_path), shards=world, **options))

    world = tmp_path / "world"
    write_world(world, 6, seed=3, per_shard=4)
    before = identity()
    assert [name for name in before if name.endswith(".tar")] == sorted(
        path.name for path in world.glob("*.tar")
    )
    shutil.rmtree(world)
    write_world(world, 6, seed=4, per_shard=4)
    changed = changed_samples(before, identity())
    assert changed[:2] == [f"{name} has changed" for name in before if name.endswith(".tar")]
    assert changed_samples(identity(), identity(validation=1))  # one sample fewer is trained on


def test_videos_are_known_by_their_bytes_and_captions(tmp_path: Path) -> None:
    def clips(*captions: str) -> dict[str, str]:
        videos = [
            CaptionedVideo(path.name, caption, facts=None, source=path)  # type: ignore[arg-type]
            for path, caption in zip(paths, captions, strict=True)
        ]
        window = Window(frames=2, stride=1, fps=8.0, start=0)
        data = VideoClips(videos, window, side=32, flip=False)
        assert Mixed(data, Stills(data), 0.5).identity() == data.identity()
        return data.identity()

    paths = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for path in paths:
        path.write_bytes(path.name.encode())
    before = clips("one", "two")
    assert changed_samples(before, clips("one", "three")) == ["the caption of b.mp4 has changed"]
    paths[0].write_bytes(b"other bytes")
    assert changed_samples(before, clips("one", "two")) == ["a.mp4 was rewritten"]


def test_names_that_occur_twice_and_another_order() -> None:
    rows = [("0.jpg", "a b"), ("0.jpg", "c d"), ("1.jpg", "e f")]
    found = by_name(rows)
    assert list(found) == ["0.jpg", "0.jpg (2)", "1.jpg"]
    assert changed_samples(found, dict(reversed(found.items()))) == [
        "the order of the samples is another one"
    ]
    assert changed_samples(found, by_name([rows[1], rows[0], rows[2]])) == [
        "0.jpg was rewritten",
        "0.jpg (2) was rewritten",
    ]
