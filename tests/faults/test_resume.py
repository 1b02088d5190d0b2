"""A run that is stopped and goes on is, at every later step, the run that was not stopped."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.common.spinning import watched
from trainer.common.threads import USERS, this_machine, thread_count

pytestmark = pytest.mark.faults
BUSY = ("run.validate_every=2", "preview.every=2", "preview.steps=1", "preview.prompts=[a <v1>]")


def compared(whole: Path, broken: Path, look: Any) -> int:
    """How many checkpoints of two runs were found equal."""
    pairs = zip(look.checkpoints(whole), look.checkpoints(broken), strict=True)
    unlike = {one.step: look.differing(one, other) for one, other in pairs}
    assert not any(unlike.values()), unlike
    return len(unlike)


@pytest.mark.sampled(1, each=("own",))
@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize(
    "own",
    [(), ("run.accumulate=2", *BUSY), ("optim.schedule=cosine", "run.precision=bf16")],
    ids=["plain", "accumulated-validated-painted", "cosine-bf16"],
)
def test_stopped_at_any_step_it_goes_on_bit_for_bit(
    own: tuple[str, ...], step: int, tmp_path: Path, run: Any, whole: Any, fault: Any, look: Any
) -> None:
    folder = tmp_path / "run"
    with fault(signals={"numbers": [signal.SIGTERM], "step": step}):
        assert run(folder, *own) == 143
    assert [each.step for each in look.checkpoints(folder)] == list(range(1, step + 2))
    assert run(folder, *own) == 0
    assert compared(whole(*own), folder, look) == 5


def test_adapters_along_the_way_are_completed_bit_for_bit(
    tmp_path: Path, run: Any, fault: Any
) -> None:
    """Stopped before the first, after it, and right at the second, whose file is then missing."""
    own = "run.keep_adapters=3"  # after steps 1 and 3 of 5
    assert run(tmp_path / "whole", own) == 0
    for step in (0, 2):
        with fault(signals={"numbers": [signal.SIGTERM], "step": step}):
            assert run(tmp_path / "broken", own) == 143
    assert not (tmp_path / "broken" / "adapters" / "step_000003.safetensors").exists()
    assert run(tmp_path / "broken", own) == 0
    whole, broken = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "adapters").iterdir()}
        for name in ("whole", "broken")
    )
    assert sorted(whole) == ["step_000001.safetensors", "step_000003.safetensors"]
    assert whole == broken


def test_stopped_at_every_step_of_one_run(
    tmp_path: Path, run: Any, whole: Any, fault: Any, look: Any
) -> None:
    """The second, third and fourth resume, too."""
    for step in range(4):
        with fault(signals={"numbers": [signal.SIGTERM], "step": step}):
            assert run(tmp_path / "broken", *BUSY) == 143
    assert run(tmp_path / "broken", *BUSY) == 0
    assert compared(whole(*BUSY), tmp_path / "broken", look) == 5
    assert len(look.events(tmp_path / "broken", "started")) == 5


@pytest.mark.sampled(1)
@pytest.mark.parametrize("source", ["pictures", "streamed"])
def test_workers_change_nothing(
    source: str,
    tmp_path: Path,
    run: Any,
    whole: Any,
    fault: Any,
    look: Any,
    request: pytest.FixtureRequest,
) -> None:
    """1, then 2, then none; as pictures of a folder, and from tars of a server."""
    own = (request.getfixturevalue("streamed"),) if source == "streamed" else ()
    for step, workers in enumerate((1, 2)):
        with fault(signals={"numbers": [signal.SIGTERM], "step": step}):
            assert run(tmp_path / "broken", f"run.workers={workers}", *own) == 143
    assert run(tmp_path / "broken", *own) == 0
    assert compared(whole(*own), tmp_path / "broken", look) == 5


def test_the_number_of_threads_stays(
    tmp_path: Path, run: Any, fault: Any, look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun with two threads, resumed by a process that would take one."""
    if thread_count(this_machine(), {}) < 2:
        pytest.skip("a run would not take two threads on one processor")
    for name in USERS:
        monkeypatch.delenv(name, raising=False)
    with watched():
        torch.set_num_threads(2)
        assert run(tmp_path / "whole") == 0
        with fault(signals={"numbers": [signal.SIGTERM], "step": 1}):
            assert run(tmp_path / "broken") == 143
        torch.set_num_threads(1)
        assert run(tmp_path / "broken") == 0
    assert compared(tmp_path / "whole", tmp_path / "broken", look) == 5
    assert [each.manifest["threads"] for each in look.checkpoints(tmp_path / "broken")] == [2] * 5


def test_only_periodic_checkpoints_are_enough(
    tmp_path: Path, run: Any, whole: Any, fault: Any, look: Any
) -> None:
    """Killed by an exception two steps after the last save: those two are trained again."""
    with fault(fail={"step": 4}), pytest.raises(RuntimeError, match="this rank alone"):
        run(tmp_path / "broken", "run.checkpoint_every=3")
    assert [each.step for each in look.checkpoints(tmp_path / "broken")] == [3]
    assert run(tmp_path / "broken", "run.checkpoint_every=3") == 0
    unbroken = whole("run.checkpoint_every=3")
    assert compared(unbroken, tmp_path / "broken", look) == 2  # of steps 3 and 5


def test_a_finished_run_says_so_and_stays(
    tmp_path: Path, run: Any, whole: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole(), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    capfd.readouterr()
    assert run(tmp_path / "run") == 0
    assert "this run is finished" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    with pytest.raises(ValueError, match=r"holds a finished run with another optim\.lr;"):
        run(tmp_path / "run", "optim.lr=0.5")


def test_more_steps_go_on(tmp_path: Path, run: Any, whole: Any, look: Any) -> None:
    assert run(tmp_path / "longer", "run.steps=3") == 0
    assert run(tmp_path / "longer") == 0
    assert compared(whole(), tmp_path / "longer", look) == 5


def test_killed_before_the_adapter_only_that_is_written(
    tmp_path: Path, run: Any, whole: Any, fault: Any
) -> None:
    shutil.copytree(whole(), tmp_path / "run")
    made = (tmp_path / "run" / "adapter.safetensors").read_bytes()
    (tmp_path / "run" / "adapter.safetensors").unlink()
    with fault(fail={"step": 0, "last": 99}):  # no step is trained
        assert run(tmp_path / "run") == 0
    assert (tmp_path / "run" / "adapter.safetensors").read_bytes() == made


def test_another_recipe_is_refused_or_told(
    tmp_path: Path, run: Any, fault: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with fault(signals={"numbers": [signal.SIGTERM], "step": 0}):
        run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"begun with methods\.selective\.projections=.* \(now "):
        run(tmp_path / "run", "methods.selective.projections=[k,v,q]")
    with pytest.raises(ValueError, match=r"begun with optim\.ema=0\.9 \(now null\)"):
        run(tmp_path / "run", "optim.ema=null")
    capfd.readouterr()
    assert run(tmp_path / "run", "optim.lr=1e-4") == 0
    assert "from step 2 on optim.lr=0.0001 instead of 0.001" in capfd.readouterr().err
