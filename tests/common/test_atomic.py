"""Files that are there completely or not at all, whoever else writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.common.atomic import beside, written_atomically


def test_two_writers_of_one_file_never_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes on two machines may have one number."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "made.npz"
    with written_atomically(path) as first, written_atomically(path) as second:
        assert first != second and first.suffix == second.suffix == ".npz"
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # its block ended last
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "made"
    path.write_text("earlier")

    def fail() -> None:
        with written_atomically(path) as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_long_names_have_room(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 240 + ".json")
    beside(path).touch()
