"""How many samples shards have, counted without opening a picture."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from tars import pack

from trainer.data.tars.count import count_samples
from trainer.data.tars.manifest import index


def png() -> bytes:
    file = BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tars without a manifest, of two samples and one; beside them what is no sample."""
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "shards"
    folder.mkdir()
    first = [("0.png", png()), ("0.txt", b"a cup"), ("1.png", png()), ("1.txt", b"a cat")]
    pack(folder / "a.tar", *first, ("2.txt", b"a caption alone"))
    pack(folder / "b.tar", ("5.png", png()), ("5.txt", b"a dog"), ("5.json", b"{}"))
    return folder


def test_without_a_manifest_samples_are_counted_by_names(shards: Path) -> None:
    """As many as an index finds."""
    found = index([shards / "a.tar", shards / "b.tar"])
    assert count_samples(shards) == sum(len(each.samples) for each in found) == 3


def test_extensions_that_are_ignored_are_no_samples(shards: Path) -> None:
    pack(shards / "c.tar", ("6.png", png()), ("6.txt", b"a"), ("6.mask", b"x"))
    assert count_samples(shards, ["mask"]) == 4


def test_a_tar_that_is_none_is_refused(shards: Path) -> None:
    (shards / "c.tar").write_bytes(json.dumps({"no": "tar"}).encode())
    with pytest.raises(ValueError, match=r"c\.tar"):
        count_samples(shards)
