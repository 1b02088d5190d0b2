"""One program at a time in a run folder; and the same run again, elsewhere, is the same run."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import signal
from pathlib import Path
from typing import Any

import pytest

from trainer.runs.run_folder import locked

pytestmark = pytest.mark.faults


def test_a_second_program_is_refused_and_a_killed_one_keeps_nobody_out(
    tmp_path: Path, run: Any, forked: Any, look: Any
) -> None:
    process = forked(tmp_path / "run", {"sleep": {"seconds": 600, "step": 1}})
    look.wait_for(tmp_path / "run" / "checkpoints" / "step-000001", process)
    whose = rf"process {process.pid} on {platform.node()} is training there; wait until it"
    with pytest.raises(ValueError, match=whose):
        run(tmp_path / "run")
    assert len(look.events(tmp_path / "run", "started")) == 1
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert run(tmp_path / "run") == 0
    assert not (tmp_path / "run" / ".holder").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path), locked(tmp_path):
        pass


def test_hash_seed_locale_and_time_zone_change_nothing(
    tmp_path: Path, run: Any, started: Any, look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ("run.steps=2", "optim.schedule=cosine")
    assert run(tmp_path / "here", *own) == 0
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    for name, value in {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "TZ": "Asia/Kabul"}.items():
        monkeypatch.setenv(name, value)
    process = started(tmp_path / "there", {}, *own)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said[-3000:]
    pairs = zip(
        look.checkpoints(tmp_path / "here"), look.checkpoints(tmp_path / "there"), strict=True
    )
    assert [look.differing(one, other) for one, other in pairs] == [[], []]
    one, other = (tmp_path / name / "adapter.safetensors" for name in ("here", "there"))
    assert one.read_bytes() == other.read_bytes()
