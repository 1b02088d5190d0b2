"""A file of the cache is used as it was written, in its place, or made again and said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from trainer.data.kept_file import kept_file


class Maker:
    """Writes a file, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, path: Path) -> None:
        self.times += 1
        path.write_bytes(b"what is kept")


def test_it_is_made_once(tmp_path: Path) -> None:
    file, make, said = tmp_path / "a" / "own.bin", Maker(), []
    for _ in range(2):
        kept_file(file, make, said.append)
        assert file.read_bytes() == b"what is kept"
    assert (make.times, said) == (1, [])
    assert sorted(path.name for path in file.parent.iterdir()) == ["own.bin", "own.sha256"]


@pytest.mark.parametrize("kind", ["cut", "altered", "another's place", "no checksum", "gone"])
def test_what_is_not_as_it_was_is_made_again(kind: str, tmp_path: Path) -> None:
    file, make, said = tmp_path / "a" / "own.bin", Maker(), []
    kept_file(file, make, said.append)
    if kind == "cut":
        file.write_bytes(b"what is kep")
    elif kind == "altered":
        file.write_bytes(b"what is Kept")
    elif kind == "another's place":
        file = shutil.move(file.parent, tmp_path / "b") / "own.bin"
    else:
        file.with_suffix(".sha256" if kind == "no checksum" else ".bin").unlink()
    kept_file(file, make, said.append)
    assert make.times == 2 and file.read_bytes() == b"what is kept"
    named = [f"{file}, kept from before, is damaged or was changed; it is made again"]
    assert said == (named if kind in ("cut", "altered", "another's place") else [])
    kept_file(file, make, said.append)
    assert make.times == 2


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        path.write_bytes(b"what")
        raise RuntimeError("interrupted")

    file, make = tmp_path / "a" / "own.bin", Maker()
    with pytest.raises(RuntimeError, match="interrupted"):
        kept_file(file, broken, print)
    assert list(file.parent.iterdir()) == []
    kept_file(file, make, print)
    assert (make.times, file.read_bytes()) == (1, b"what is kept")
