"""The sweeps behind docs/promises.md, many minutes: pytest -m long."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long
KILLS = 50


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_all_points_of_24_steps(
    workers: int, tmp_path: Path, run: Any, fault: Any, look: Any
) -> None:
    """Each point, and a second and a third resume one step later each."""
    own = ("run.steps=24", "run.validate_every=5", f"run.workers={workers}")
    assert run(tmp_path / "whole", *own) == 0
    whole = look.checkpoints(tmp_path / "whole")
    for step in range(23):
        folder = tmp_path / f"after-{step}"
        for stop in range(step, min(step + 3, 23)):
            with fault(signals={"numbers": [signal.SIGTERM], "step": stop}):
                assert run(folder, *own) == 143
        assert run(folder, *own) == 0
        pairs = zip(whole, look.checkpoints(folder), strict=True)
        assert [look.differing(one, other) for one, other in pairs] == [[]] * 24


def test_fifty_kills(
    tmp_path: Path, run: Any, forked: Any, look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temporary files on another file system; each kill at a random moment after the first new
    checkpoint, or before it."""
    if os.path.isdir("/dev/shm"):
        monkeypatch.setenv("TMPDIR", "/dev/shm")
    own = ("run.steps=400", "run.checkpoint_keep=3")
    moments, kills = random.Random(0), 0
    root = tmp_path / "run" / "checkpoints"
    while kills < KILLS:
        process = forked(tmp_path / "run", {}, *own)
        before, deadline = newest(root), time.monotonic() + 60
        while newest(root) <= before and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it came to its end before fifty kills"
        kills += 1
    assert run(tmp_path / "run", *own) == 0
    assert run(tmp_path / "whole", *own) == 0
    one, other = (look.checkpoints(tmp_path / name)[-1] for name in ("whole", "run"))
    assert one.step == other.step == 400 and look.differing(one, other) == []
    assert not look.events(tmp_path / "run", "fallback")


def newest(root: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in root.glob("step-*")), default=0)
