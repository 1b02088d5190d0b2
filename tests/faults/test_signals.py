"""A signal ends a run at the end of a step, saved once, with its own exit code."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGTERM], 143),
        ([signal.SIGINT], 130),
        ([signal.SIGUSR1], 75),
        ([signal.SIGTERM, signal.SIGTERM], 143),
        ([signal.SIGUSR1, signal.SIGTERM], 75),
    ],
    ids=["term", "int", "usr1", "term-twice", "usr1-then-term"],
)
def test_it_is_saved_once_and_ends_with_its_code(
    numbers: list[int], code: int, tmp_path: Path, run: Any, fault: Any, look: Any
) -> None:
    before = [signal.getsignal(number) for number in numbers]
    with fault(signals={"numbers": numbers, "step": 1}):
        assert run(tmp_path / "run", "run.checkpoint_every=0") == code
    assert [each.step for each in look.checkpoints(tmp_path / "run")] == [2]
    (event,) = look.events(tmp_path / "run", "stopped")
    assert event["saved"] and event["step"] == 2
    assert not (tmp_path / "run" / "adapter.safetensors").exists()
    assert [signal.getsignal(number) for number in numbers] == before


def test_in_the_middle_of_accumulation_the_step_is_finished(
    tmp_path: Path, run: Any, fault: Any, look: Any
) -> None:
    with fault(signals={"numbers": [signal.SIGTERM], "step": 1}):
        assert run(tmp_path / "run", "run.accumulate=3", "run.checkpoint_every=0") == 143
    (made,) = look.checkpoints(tmp_path / "run")
    assert (made.step, made.micro_step) == (2, 6)


def test_during_a_save_that_save_is_the_one(
    tmp_path: Path, run: Any, fault: Any, look: Any
) -> None:
    with fault(signal_in_save={"number": signal.SIGTERM, "save": 2}):
        assert run(tmp_path / "run") == 143
    assert [each.step for each in look.checkpoints(tmp_path / "run")] == [1, 2]


def test_killed_in_the_save_that_a_signal_asked_for(
    tmp_path: Path, run: Any, whole: Any, forked: Any, look: Any
) -> None:
    """As a cluster does it whose patience ends sooner: the last one stands."""
    own = ("run.checkpoint_every=2",)
    numbers = {"numbers": [signal.SIGTERM], "step": 2}
    kill = {"function": "_put", "call": 2}
    process = forked(tmp_path / "run", {"signals": numbers, "kill_in_save": kill}, *own)
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    assert [each.step for each in look.checkpoints(tmp_path / "run")] == [2]
    assert run(tmp_path / "run", *own) == 0
    one, other = (look.checkpoints(each)[-1] for each in (whole(*own), tmp_path / "run"))
    assert look.differing(one, other) == []


def test_during_validation_nothing_is_waited_for(
    tmp_path: Path, run: Any, whole: Any, fault: Any, look: Any
) -> None:
    """The model holds the average then; what is saved are its own weights."""
    own = ("run.validate_every=2", "run.checkpoint_every=0")
    unbroken = look.checkpoints(whole(*own[:1]))
    with fault(signal_in_validation={"number": signal.SIGTERM, "step": 2}):
        assert run(tmp_path / "run", *own) == 143
    (made,) = look.checkpoints(tmp_path / "run")
    assert made.step == 2
    assert look.differing(unbroken[1], made) == []
    assert run(tmp_path / "run", *own[:1]) == 0
    last = look.checkpoints(tmp_path / "run")[-1]
    assert look.differing(unbroken[-1], last) == []


def test_interrupted_twice_it_leaves_at_once(tmp_path: Path, forked: Any, look: Any) -> None:
    """The second Ctrl-C comes inside the step, which would have taken a minute."""
    numbers = {"numbers": [signal.SIGINT, signal.SIGINT], "step": 1}
    process = forked(tmp_path / "run", {"signals": numbers, "sleep": {"seconds": 600, "step": 1}})
    process.join(240)
    assert process.exitcode == 130
    assert [each.step for each in look.checkpoints(tmp_path / "run")] == [1]


def test_workers_outlive_a_signal_to_the_whole_job(tmp_path: Path, forked: Any, look: Any) -> None:
    """As a terminal and a cluster send it: to every process of the group."""
    process = forked(
        tmp_path / "run", {"lead": {}, "sleep": {"seconds": 1, "step": 1, "last": 99}},
        "run.workers=2", "run.steps=60",
    )  # fmt: skip
    look.wait_for(tmp_path / "run" / "checkpoints" / "step-000001", process)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)
    process.join(50)
    assert process.exitcode == 143
    assert time.monotonic() - began < 10
    assert look.events(tmp_path / "run", "stopped")[0]["saved"]
