"""The sweeps behind docs/promises.md, many minutes: pytest -m long."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long
KILLS = 50


@pytest.mark.parametrize("source", ["pictures", "streamed"])
def test_all_points_of_24_steps(
    source: str, tmp_path: Path, run: Any, fault: Any, look: Any, request: pytest.FixtureRequest
) -> None:
    """Each point alone, from what a run that ended there has left; and runs that are stopped after
    every step, so that each goes on from the one before: with no, one and two data workers."""
    tars = (request.getfixturevalue("streamed"),) if source == "streamed" else ()
    own = ("run.steps=24", *(tars or ("run.validate_every=5",)))  # tars hold none out
    assert run(tmp_path / "whole", *own) == 0
    whole = look.checkpoints(tmp_path / "whole")

    def check(folder: Path) -> None:
        pairs = zip(whole, look.checkpoints(folder), strict=True)
        assert [look.differing(one, other) for one, other in pairs] == [[]] * 24

    for step in range(1, 24):
        folder = tmp_path / f"after-{step}"
        for each in whole[:step]:
            shutil.copytree(each.folder, folder / "checkpoints" / each.folder.name)
        assert run(folder, *own) == 0
        check(folder)
    for workers in range(3):
        folder, more = tmp_path / f"workers-{workers}", f"run.workers={workers}"
        for step in range(23):
            with fault(signals={"numbers": [signal.SIGTERM], "step": step}):
                assert run(folder, *own, more) == 143
        assert run(folder, *own, more) == 0
        check(folder)


@pytest.mark.ddp
def test_what_two_ranks_saved_is_gone_on_with_by_one_and_by_four(
    tmp_path: Path, run: Any, started: Any, fault: Any, look: Any
) -> None:
    """The same samples at the same places, with the same noise and timesteps; 0 and 3 workers."""
    own = ("run.steps=6", "run.batch_size=4")
    (tmp_path / "whole").mkdir()
    with fault(trace={"folder": str(tmp_path / "whole")}):
        assert run(tmp_path / "whole", *own) == 0
    wanted = traced(tmp_path / "whole")

    def part(folder: Path, ranks: int, code: int, *more: str, **faults: Any) -> None:
        folder.mkdir(exist_ok=True)
        ranked = (f"run.devices={ranks}", "run.accelerator=cpu")
        faults["trace"] = {"folder": str(folder)}
        process = started(folder, faults, *own, *ranked, *more)
        _, said = process.communicate(timeout=600)
        assert process.returncode == code, said[-3000:]

    numbers = {"numbers": [signal.SIGTERM], "step": 2, "rank": 1}
    part(tmp_path / "two", 2, 143, signals=numbers)
    for ranks, workers in ((1, 3), (4, 0)):
        folder = tmp_path / f"ranks-{ranks}"
        shutil.copytree(tmp_path / "two", folder)
        part(folder, ranks, 0, f"run.workers={workers}")
        found = traced(folder)
        assert found.keys() == wanted.keys()
        for key, row in wanted.items():
            assert abs(found[key].pop("loss") - row["loss"]) < 1e-5
            assert found[key] == {name: row[name] for name in found[key]}


def traced(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """What `driver.trace` has written down, by micro-batch and place in it."""
    lines = [
        line for path in sorted(folder.glob("seen-*")) for line in path.read_text().splitlines()
    ]
    rows = map(json.loads, lines)
    return {(row.pop("step"), row.pop("place")): row for row in rows}


def test_fifty_kills(
    tmp_path: Path, run: Any, forked: Any, look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temporary files on another file system; each kill at a random moment after the first new
    checkpoint, or before it."""
    if os.path.isdir("/dev/shm"):
        monkeypatch.setenv("TMPDIR", "/dev/shm")
    own = ("run.steps=250", "run.checkpoint_keep=3")
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
    assert one.step == other.step == 250 and look.differing(one, other) == []
    assert not look.events(tmp_path / "run", "fallback")


def newest(root: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in root.glob("step-*")), default=0)
