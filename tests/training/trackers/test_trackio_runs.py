"""trackio itself, on this machine: numbers, pictures, and a run that goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
from PIL import Image
from trainer.training.trackers.trackio_runs import TrackioTracker

own = TrackioTracker("lora/x", "0123456789", {"optim.lr": 0.1, "lineage": sys.argv[1]})
for step in map(int, sys.argv[2:]):
    own.log_metrics({"train/loss": 1 / step, "lr/lora": 0.1}, step)
    own.log_pictures("preview", [Image.new("RGB", (8, 8))], prompts=["a fox"], step=step)
own.finalize("success")
"""
READ = """
import json
from trackio.sqlite_storage import SQLiteStorage

(name,) = SQLiteStorage.get_runs("attention-trainer")
rows = SQLiteStorage.get_logs("attention-trainer", name)
rows = [{key: value for key, value in row.items() if key != "timestamp"} for row in rows]
config = SQLiteStorage.get_run_config("attention-trainer", name)
print(json.dumps([name, rows, config], default=str))
"""


def test_a_run_that_goes_on_is_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)}

    def ran(script: str, *words: str) -> str:
        line = [sys.executable, "-c", script, *words]
        done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert ran(SCRIPT, "begun", "1", "2") == ""  # standard output is for the run folder
    assert ran(SCRIPT, "resumed", "4") == ""
    name, rows, config = json.loads(ran(READ))
    assert name == "lora/x 01234567"
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == {1: 1.0, 2: 0.5, 4: 0.25}
    pictures = [row for row in rows if "preview/00" in row]
    assert [row["step"] for row in pictures] == [1, 2, 4]
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 3
    assert config["optim.lr"] == 0.1
