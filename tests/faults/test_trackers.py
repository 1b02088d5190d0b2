"""A tracker that fails is left out: the run goes on, and the record in its folder is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.faults
OWN = ("run.log_every=1", "run.checkpoint_every=0")


def whole_record(folder: Path) -> bool:
    """A loss for each of five steps, and the end."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line for line in map(json.loads, lines) if "train/loss" in line]
    return len(losses) == 5 and (folder / "adapter.safetensors").is_file()


def test_a_server_that_is_not_there(
    tmp_path: Path, forked: Any, look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody is logged in, and the connection is refused: what wandb would have sent is kept."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    own = ("preview.every=2", "preview.steps=1", "preview.prompts=[a <v1>]")
    process = forked(tmp_path / "run", {}, "tracker=wandb", *OWN, *own)
    process.join(240)
    said = (tmp_path / "run.err").read_text(encoding="utf-8")
    assert process.exitcode == 0, said[-3000:]
    assert "tracker=wandb: " in said and "the run continues" in said
    (event,) = look.events(tmp_path / "run", "tracker_failed")
    assert "127.0.0.1:9" in event["reason"]
    assert whole_record(tmp_path / "run")
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    assert list((tmp_path / "run").glob("wandb/offline-run-*/files/media/images/*.png"))


def test_a_server_that_goes_away(
    tmp_path: Path, started: Any, look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the run and its first step, then it is killed."""
    pytest.importorskip("wandb")
    command = [sys.executable, str(Path(__file__).with_name("wandb_server.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        faults = {"kill_server": {"pid": server.pid, "step": 1}, "impatient": {"seconds": 3}}
        process = started(tmp_path / "run", faults, "tracker=wandb", *OWN)
        try:
            _, said = process.communicate(timeout=240)
            assert server.wait(10) == -9  # it was there until then
        finally:
            server.kill()
    assert process.returncode == 0, said[-3000:]
    assert (
        "tracker=wandb: not all was uploaded after 3 seconds, `wandb sync --include-online" in said
    )
    (event,) = look.events(tmp_path / "run", "tracker_failed")
    assert event["tracker"] == "WandbTracker"
    assert whole_record(tmp_path / "run")
    (kept,) = (tmp_path / "run").glob("wandb/run-*/*.wandb")
    own = (tmp_path / "run" / "tracker.id").read_text().split()[0]
    assert kept.name == f"run-{own}.wandb"


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, run: Any, look: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file in its place")
    assert run(tmp_path / "run", "tracker=tensorboard", *OWN) == 0
    assert "tracker=tensorboard: " in capfd.readouterr().err
    assert len(look.events(tmp_path / "run", "tracker_failed")) == 1
    assert whole_record(tmp_path / "run")


def test_a_disk_that_fills_up_under_it(tmp_path: Path, run: Any, look: Any) -> None:
    place = tmp_path / "run" / "tensorboard"
    place.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        (place / "ballast").write_bytes(bytes(4096))
        assert run(tmp_path / "run", "tracker=tensorboard", *OWN) == 0
    finally:
        subprocess.run(["umount", str(place)], check=True)
    (event,) = look.events(tmp_path / "run", "tracker_failed")
    assert "No space left" in event["reason"]
    assert whole_record(tmp_path / "run")
