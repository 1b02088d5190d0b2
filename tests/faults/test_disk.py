"""A save that cannot be written leaves the one before it, and the run goes on or ends by policy."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from largest_file import largest_file

from trainer.training import checkpoint_files as checkpoint

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.STATE])
def test_a_write_that_fails_half_way_ends_the_run(
    name: str, tmp_path: Path, run: Any, look: Any
) -> None:
    assert run(tmp_path / "run", "run.steps=2") == 0
    made = look.checkpoints(tmp_path / "run")
    limit = (made[-1].folder / name).stat().st_size // 2
    with largest_file(limit):
        assert run(tmp_path / "run") == 74
    assert [each.step for each in look.checkpoints(tmp_path / "run")] == [1, 2]
    assert not list((tmp_path / "run" / "checkpoints").glob(".step-*"))
    assert "File too large" in look.events(tmp_path / "run", "save_failed")[0]["reason"]
    assert run(tmp_path / "run") == 0
    assert [each.step for each in look.checkpoints(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_by_the_other_policy_it_goes_on(tmp_path: Path, run: Any, look: Any) -> None:
    assert run(tmp_path / "run", "run.steps=2") == 0
    size = (look.checkpoints(tmp_path / "run")[-1].folder / checkpoint.STATE).stat().st_size
    with largest_file(size // 2):  # the adapter is smaller
        assert run(tmp_path / "run", "run.on_disk_full=continue") == 0
    assert len(look.events(tmp_path / "run", "save_failed")) == 3
    assert [each.step for each in look.checkpoints(tmp_path / "run")] == [1, 2]


def test_a_save_that_will_not_fit_is_not_begun(
    tmp_path: Path, run: Any, fault: Any, look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with fault(kill_in_save={"function": "_write_weights", "call": 1}):  # it would be fatal
        assert run(tmp_path / "run") == 74
    (event,) = look.events(tmp_path / "run", "save_failed")
    assert "a checkpoint needs" in event["reason"] and "1.0 MB are free" in event["reason"]


def test_a_signal_without_room_to_save_says_that_nothing_was_saved(
    tmp_path: Path, run: Any, fault: Any, look: Any
) -> None:
    numbers = {"numbers": [signal.SIGTERM], "step": 1}
    with largest_file(10_000), fault(signals=numbers):
        assert run(tmp_path / "run", "run.checkpoint_every=0") == 74
    assert look.events(tmp_path / "run", "stopped")[0]["saved"] is False


def test_a_full_file_system(tmp_path: Path, run: Any, look: Any) -> None:
    """A real one, of 5 MB, 1.5 MB of them taken: there is room for three checkpoints of four."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        (place / "ballast").write_bytes(bytes(1_500_000))
        assert run(place / "run", "run.steps=4") == 74
        assert [each.step for each in look.checkpoints(place / "run")] == [1, 2, 3]
        (place / "ballast").unlink()
        assert run(place / "run", "run.steps=4") == 0
        assert [each.step for each in look.checkpoints(place / "run")] == [1, 2, 3, 4]
    finally:
        subprocess.run(["umount", str(place)], check=True)
