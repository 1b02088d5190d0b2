"""Two ranks agree: on a signal to one of them, on a batch of one of them; and end together."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launched

pytestmark = [pytest.mark.faults, pytest.mark.ddp]
TWO = ("run.devices=2", "run.accelerator=cpu")
SIDE = ("preview.every=2", "preview.steps=1", "preview.prompts=[a <v1>]", "run.validate_every=2")


def test_one_rank_meets_nonsense_and_a_signal(
    tmp_path: Path, run: Any, forked: Any, fault: Any, look: Any
) -> None:
    """NaN in the second step of rank 1, SIGTERM to rank 1 in its third; between them a validation
    fails, and a preview, which the first rank makes alone. What both saved is gone on with by one
    rank: the same samples, noise and timesteps."""
    faults = {
        "nan": {"step": 1, "rank": 1},
        "preview": {"error": "no room", "call": 2},
        "validation": {"error": "no room", "call": 1},
        "signals": {"numbers": [signal.SIGTERM], "step": 2, "rank": 1},
    }
    own = ("run.on_nonfinite=skip", "run.checkpoint_every=0", *SIDE)
    ranks = [forked(tmp_path / "run", faults, *TWO, *own, rank=each) for each in launched()]
    for process in ranks:
        process.join(240)
    said = (tmp_path / "run.0.err").read_text()
    assert [process.exitcode for process in ranks] == [143, 143], said[-3000:]
    assert said.count("SIGTERM: saved after step 3") == 1
    *_, made = look.checkpoints(tmp_path / "run")
    assert made.step == 3 and made.manifest["world_size"] == 2
    for kind in ("preview_failed", "validation_failed"):
        (failed,) = look.events(tmp_path / "run", kind)
        assert failed["step"] == 2 and failed["saved"]
    (event,) = look.events(tmp_path / "run", "nonfinite")
    assert [batch["rank"] for batch in event["batches"] if batch["loss"] == "nan"] == [1]
    assert run(tmp_path / "run", "run.on_nonfinite=skip") == 0
    assert (tmp_path / "run" / "adapter.safetensors").is_file()

    with fault(nan={"step": 1}):
        assert run(tmp_path / "whole", "run.on_nonfinite=skip") == 0
    first, *_, last = look.checkpoints(tmp_path / "whole")
    start, whole, broken = (
        torch.cat([value.flatten() for value in look.read_checkpoint(each)[0].values()])
        for each in (first, last, look.checkpoints(tmp_path / "run")[-1])
    )
    assert (whole - broken).norm() < 0.01 * (whole - start).norm()


def test_an_error_of_one_rank_ends_all(tmp_path: Path, started: Any, look: Any) -> None:
    process = started(tmp_path / "run", {"fail": {"step": 1, "rank": 1}}, *TWO)
    _, said = process.communicate(timeout=240)
    ended = time.monotonic()  # of one clock for all processes
    assert process.returncode != 0
    (began,) = re.findall(r"a fault of this rank alone, at ([\d.]+)", said)[:1]
    assert ended - float(began) < 15
    assert [each.step for each in look.checkpoints(tmp_path / "run")] == [1]
