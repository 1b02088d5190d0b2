"""`data build`, `data verify`, and what a run reads of shards it has met before."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.__main__ import main
from trainer.data.source import Needs
from trainer.data.sources.shards import Shards
from trainer.data.sources.video import Video
from trainer.data.tars.manifest import Manifest, save_manifest
from trainer.data.tars.shard_checksums import (
    MANIFEST,
    build_manifest,
    kept_manifest,
    parse_manifest,
)
from trainer.data.tars.write_shards import write_shards

FIRST = "shard-000000.tar"


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Samples s0 to s4 in two shards."""
    records = []
    for i in range(5):
        picture(i).save(tmp_path / "a.png")
        members = {"png": (tmp_path / "a.png").read_bytes(), "txt": f"thing {i}".encode()}
        records.append((f"s{i}", members))
    write_shards(tmp_path / "shards", records, per_shard=3)
    return tmp_path / "shards"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are hashed."""
    seen: list[str] = []
    true = hashlib.file_digest

    def digest(file: Any, kind: Any) -> Any:
        seen.append(Path(file.name).name)
        return true(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    return seen


def open_shards(place: Path) -> Any:
    cache = place.parent / "cache"
    needs = Needs(32, 4, lambda prompts, seed, guidance: (), cache, lambda: "tiny")
    return Shards(shards=place).open(needs)[0]


@pytest.mark.parametrize(
    ("kind", "words", "shape"),
    [("world", [], (1, 3, 64, 64)), ("clips", ["frames=4"], (4, 3, 64, 64))],
)
def test_the_world_written_is_whole_and_read(
    tmp_path: Path, capsys: Any, kind: str, words: list[str], shape: tuple[int, ...]
) -> None:
    out = tmp_path / "made"
    words = ["data", kind, f"out={out}", "count=3", "per_shard=2", "seed=5", *words]
    assert main(words) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["data", "verify", f"shards={out}"]) == 0
    needs = Needs(64, 4, lambda prompts, seed, guidance: (), tmp_path, lambda: "tiny")
    source = Shards(shards=out) if kind == "world" else Video(video=out, frames=4)
    dataset = source.open(needs)[0]
    assert len(dataset) == 3
    assert dataset.image(0).reshape(-1, 3, 64, 64).shape == shape


def test_a_shard_is_hashed_once_until_its_size_or_time_changes(
    place: Path, hashed: list[str]
) -> None:
    open_shards(place)
    assert sorted(hashed) == [FIRST, "shard-000001.tar"]
    hashed.clear()
    open_shards(place)
    assert hashed == []
    os.utime(place / FIRST, ns=(1, 1))
    open_shards(place)
    assert hashed == [FIRST]
    for known in (b"no json", b"[]", b'{"shard-000000.tar": 3}'):
        (only,) = (place.parent / "cache" / "hashed").iterdir()
        only.write_bytes(known)
        hashed.clear()
        open_shards(place)
        assert FIRST in hashed


def test_what_changes_no_time_is_found_when_it_is_read(place: Path) -> None:
    """A rotten disk: the one thing that size and time do not show."""
    train = open_shards(place)
    path, part = place / FIRST, train.rows[1][1].members["png"]
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[part.offset + 50] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    train = open_shards(place)
    train.image(0)
    with pytest.raises(ValueError, match=rf"{FIRST}: the bytes of s1\.png"):
        train.image(1)


def test_a_cache_nobody_may_write_costs_the_hash_only(place: Path, hashed: list[str]) -> None:
    (place.parent / "cache").write_text("a file in its place")
    for _ in range(2):
        hashed.clear()
        open_shards(place)
        assert len(hashed) == 2


def test_build_writes_what_the_first_use_would(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_CACHE", str(place.parent / "other"))
    made = (place / "manifest.json").read_bytes()
    assert main(["data", "build", f"shards={place}"]) == 78
    assert "is there already; `data verify" in capsys.readouterr().err
    (place / "manifest.json").unlink()
    assert main(["data", "verify", f"shards={place}"]) == 78
    assert "`data build shards=" in capsys.readouterr().err
    assert main(["data", "build", f"shards={place}"]) == 0
    assert "manifest.json: 2 shards, 5 samples, " in capsys.readouterr().out
    assert (place / "manifest.json").read_bytes() == made
    assert main(["data", "verify", f"shards={place}"]) == 0
    assert "no problem found: 2 shards, 5 samples" in capsys.readouterr().out
    assert main(["data", "verify", f"shards={place / FIRST}"]) == 0
    assert "1 shards, 3 samples" in capsys.readouterr().out


def test_verify_does_not_trust_what_was_hashed_before(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINER_CACHE", str(place.parent / "cache"))
    train = open_shards(place)
    path, stat = place / FIRST, (place / FIRST).stat()
    data = bytearray(path.read_bytes())
    data[train.rows[2][1].members["txt"].offset] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert main(["data", "verify", f"shards={place}"]) == 65
    printed = capsys.readouterr()
    assert printed.out == f"{FIRST}: s2.txt has other bytes than were listed\n"
    assert printed.err.startswith("problems found: 1; 2 shards, 5 samples")


def test_a_manifest_that_lies_is_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = parse_manifest((place / "manifest.json").read_bytes(), "it")
    crc = found.shards[0].samples[1].members["png"].crc32
    text = (place / "manifest.json").read_text()
    (place / "manifest.json").write_text(text.replace(str(crc), str(crc ^ 1)))
    assert main(["data", "verify", f"shards={place}"]) == 65
    assert f"{FIRST}: s1.png has other bytes" in capsys.readouterr().out


def test_photos_are_verified_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    picture(0).save(folder / "a.png")
    assert main(["data", "verify", f"folder={folder}"]) == 0
    assert "1 of 1 photos are fine" in capsys.readouterr().out
    picture(1).save(folder / "b.jpg")
    (folder / "b.jpg").write_bytes((folder / "b.jpg").read_bytes()[:300])
    (folder / "a.txt").write_bytes(b"\xff")
    picture(2).save(folder / "c.png")
    assert main(["data", "verify", f"folder={folder}"]) == 65
    printed = capsys.readouterr()
    assert "a.txt: not UTF-8" in printed.out and "b.jpg: truncated or damaged" in printed.out
    assert "1 of 3 photos are fine" in printed.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "data world, clips, build, verify, inspect: one of them is needed"),
        (["check"], "'check' is none of them"),
        (["build"], "shards is missing, as in shards=./shards"),
        (["verify", "shard=x"], "shard: no such key; did you mean shards?"),
        (["verify", "shards=pipe:ls"], "commands and remote addresses are not read"),
        (["verify", "folder=x", "ignore=[a]"], "ignore= goes with shards= alone"),
        (["build", "shards=nowhere"], "no such file or folder"),
        (["inspect", "count=4"], "recipe=<name> is missing"),
        (["inspect", "recipe=custom_diffusion", "count=0"], "count=0: a whole number is needed"),
    ],
)
def test_mistakes(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *words]) == 78
    assert says in capsys.readouterr().err


def test_a_manifest_in_the_cache_is_found(place: Path, tmp_path: Path) -> None:
    """That of shards whose folder takes no file."""
    (place / MANIFEST).unlink(missing_ok=True)
    (place / MANIFEST).mkdir()  # nothing can be written under its name
    cache = tmp_path / "cache"
    at, made = build_manifest(place, cache)
    assert at.is_relative_to(cache)
    found = kept_manifest(place, cache)
    assert found is not None and found[0] == at
    assert found[1] == {shard.name: shard for shard in made}
    assert kept_manifest(place, tmp_path / "elsewhere") is None


def test_a_manifest_knows_width_and_height(tmp_path: Path) -> None:
    Image.new("RGB", (48, 20)).save(tmp_path / "a.png")
    members = {"png": (tmp_path / "a.png").read_bytes(), "txt": b"wide"}
    write_shards(tmp_path / "wide", [("s0", members)], per_shard=3)
    _, (shard,) = build_manifest(tmp_path / "wide", tmp_path / "cache")
    assert [(entry.width, entry.height) for entry in shard.samples] == [(48, 20)]


def test_a_manifest_makes_the_folders_above_it(tmp_path: Path) -> None:
    at = tmp_path / "a" / "b" / "m.json"
    save_manifest(Manifest(shards=()), at)
    assert parse_manifest(at.read_bytes(), at).shards == ()
