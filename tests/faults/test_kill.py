"""kill -9 at any moment, saves included: the run goes on, and ends as the one that was left
alone."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
    ("function", "call", "left"),
    [
        ("_write_weights", 2, [1]),
        ("_write_state", 2, [1]),
        ("_sync", 2, [1]),
        ("_put", 2, [1]),
        ("prune_checkpoints", 2, [1, 2]),
    ],
    ids=["empty", "weights-only", "not-synced", "before-the-name", "before-the-retention"],
)
def test_inside_a_save(
    function: str,
    call: int,
    left: list[int],
    tmp_path: Path,
    run: Any,
    whole: Any,
    forked: Any,
    look: Any,
) -> None:
    process = forked(tmp_path / "run", {"kill_in_save": {"function": function, "call": call}})
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    assert [each.step for each in look.checkpoints(tmp_path / "run")] == left
    assert run(tmp_path / "run") == 0
    pairs = zip(look.checkpoints(whole()), look.checkpoints(tmp_path / "run"), strict=True)
    assert [look.differing(one, other) for one, other in pairs] == [[]] * 5
    assert not list((tmp_path / "run" / "checkpoints").glob(".step-*"))  # nothing half written
    assert not look.events(tmp_path / "run", "fallback")
