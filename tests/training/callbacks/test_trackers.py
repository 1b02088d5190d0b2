"""What a tracker knows a run by: an id that no other run has and that a resumed run keeps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from commands import command
from lightning.pytorch.loggers import Logger

from trainer.training.callbacks.trackers import Steady, make_trackers, shown_name

OWN = [
    "run.batch_size=2", "data.prior_weight=0", "data.augment=false", "run.validate_every=0",
    "preview.every=0", "run.checkpoint_every=1", "tracker=wandb", "run.device=cpu",
]  # fmt: skip


def wandb_facts(folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    steady = make_trackers("wandb", folder, {}, print)[0]
    assert isinstance(steady, Steady)
    (found,) = {(t._wandb_init["id"], t._wandb_init["name"]) for t in steady.trackers}  # type: ignore[attr-defined]
    return dict(zip(("id", "name"), found, strict=True))


def test_no_two_runs_share_an_id_and_a_run_keeps_its_own(tmp_path: Path) -> None:
    """Two recipes of one run.id, and the runs of a continual recipe, whose folders are alike."""
    pytest.importorskip("wandb")
    names = ["lora/x", "dora/x", "lora/y", "c_lora/x/task-0", "c_lora/x/task-1", "c_lora/y/task-0"]
    found = {name: wandb_facts(tmp_path / name) for name in names}
    assert len({facts["id"] for facts in found.values()}) == len(names)
    assert {name: facts["name"] for name, facts in found.items()} == {name: name for name in names}
    assert {name: wandb_facts(tmp_path / name) for name in names} == found
    (tmp_path / "lora" / "x").rename(tmp_path / "moved")
    assert wandb_facts(tmp_path / "moved")["id"] == found["lora/x"]["id"]


def test_a_run_of_an_earlier_version_keeps_the_name_of_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    (tmp_path / "lora" / "x" / "wandb" / "offline-run-20261101_101010-x").mkdir(parents=True)
    assert wandb_facts(tmp_path / "lora" / "x")["id"] == "x"


def test_the_name_of_a_folder_that_was_given() -> None:
    assert shown_name(Path("/a/b/here")) == "b/here"
    assert shown_name(Path("/a/b/task-3")) == "a/b/task-3"


def test_a_resumed_run_is_the_same_run_of_wandb(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("WANDB_API_KEY", None)
    for steps in (1, 2):
        words = ["recipe=lora", f"backbone={tiny_folder}", *OWN, f"run={tmp_path / 'run'}"]
        done = command("fit", *words, f"run.steps={steps}", env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    kept = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")]
    own = (tmp_path / "run" / "tracker.id").read_text().strip()
    assert kept == [f"run-{own}.wandb"] * 2
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in events] == ["started", "finished"] * 2


class Broken(Logger):
    name = version = "broken"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise MemoryError

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        raise AssertionError("it was left out")


def test_a_tracker_whose_end_is_broken_too_ends_no_run() -> None:
    told: list[str] = []

    def failed(tracker: Logger, error: Exception) -> None:
        told.append(type(error).__name__)
        raise BrokenPipeError

    steady = Steady([Broken()], failed)
    steady.log_metrics({"loss": 1.0})
    steady.log_hyperparams({})
    steady.finalize("success")
    assert told == ["MemoryError"] and steady.trackers == []
