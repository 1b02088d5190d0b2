"""A data worker that dies or hangs ends the run, which goes on from there."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [(signal.SIGKILL, 1, "killed by signal"), (signal.SIGSTOP, 124, "in section 'data'")],
    ids=["killed", "hung"],
)
def test_it_ends_clearly_and_goes_on(
    number: int, code: int, says: str, tmp_path: Path, forked: Any, run: Any, look: Any
) -> None:
    faults = {"signal_worker": {"number": number, "step": 1}}
    own = ("run.steps=60", "run.checkpoint_keep=99")
    process = forked(tmp_path / "run", faults, *own, "run.workers=1", "run.timeouts.data=15")
    look.wait_for(tmp_path / "run" / "checkpoints" / "step-000001", process)
    began = time.monotonic()
    process.join(120)
    assert time.monotonic() - began < 90
    said = (tmp_path / "run.err").read_text(encoding="utf-8")
    assert process.exitcode == code and says in said
    assert number != signal.SIGKILL or ("run.workers=0" in said and "Traceback" not in said)
    last = look.checkpoints(tmp_path / "run")[-1].step
    assert 1 <= last < 60
    own = (f"run.steps={last + 1}",)
    assert run(tmp_path / "run", *own) == 0
    assert run(tmp_path / "whole", *own) == 0
    pairs = [look.checkpoints(tmp_path / name)[-1] for name in ("whole", "run")]
    assert look.differing(*pairs) == []
