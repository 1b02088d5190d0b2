"""A section that never ends is ended, with the stacks of all threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.faults


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("section", "faults", "frame"),
    [
        ("step", {"sleep": {"seconds": 600, "step": 1}}, "in act"),
        ("data", {"sleep_in_data": {"seconds": 600, "step": 1}}, "in getitem"),
        ("save", {"sleep_in_save": {"seconds": 600, "save": 2}}, "in write"),
    ],
)
def test_it_ends_and_shows_where(
    section: str, faults: Any, frame: str, tmp_path: Path, forked: Any, run: Any, look: Any
) -> None:
    """A save that hangs leaves the one before it, and no half-written one under its name."""
    process = forked(tmp_path / "run", faults, f"run.timeouts.{section}=2")
    process.join(240)
    assert process.exitcode == 124
    text = (tmp_path / "run" / "hang-0.txt").read_text(encoding="utf-8")
    assert f"run.timeouts.{section}=2" in text and frame in text
    assert [each.step for each in look.checkpoints(tmp_path / "run")] == [1]
    assert run(tmp_path / "run") == 0
