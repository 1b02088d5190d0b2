"""What a tracker knows a run by: an id that no other run has and that a resumed run keeps."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import command
from wandb_files import stored_in

from trainer.training.trackers.tracker import shown_name
from trainer.training.trackers.wandb_runs import WandbTracker, logged_in, wandb_trackers

OWN = [
    "run.batch_size=2", "data.prior_weight=0", "data.augment=false", "run.validate_every=2",
    "preview.every=99", "preview.steps=1", "preview.prompts=[a <v1>]", "run.checkpoint_every=3",
    "tracker=wandb", "run.device=cpu",
]  # fmt: skip


def wandb_facts(folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    made = wandb_trackers(folder, {}, say=print)
    (found,) = {(each._wandb_init["id"], each._wandb_init["name"]) for each in made}
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
    assert wandb_facts(tmp_path / "moved")["id"] == found["lora/x"]["id"]


def test_a_run_of_an_earlier_version_keeps_the_name_of_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    (tmp_path / "lora" / "x" / "wandb" / "offline-run-20261101_101010-x").mkdir(parents=True)
    assert wandb_facts(tmp_path / "lora" / "x")["id"] == "x"


def test_the_name_of_a_folder_that_was_given() -> None:
    assert shown_name(Path("/a/b/here")) == "b/here"
    assert shown_name(Path("/a/b/task-3")) == "a/b/task-3"


def test_a_resumed_run_is_the_same_run_of_wandb(tiny_folder: Path, tmp_path: Path) -> None:
    """Shorter than the steps between two logs; its steps are wandb's, and a line says how to upload
    it."""
    pytest.importorskip("wandb")
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("WANDB_API_KEY", None)
    said = []
    for steps in (3, 4):
        words = ["recipe=lora", f"backbone={tiny_folder}", *OWN, f"run={tmp_path / 'run'}"]
        done = command("fit", *words, f"run.steps={steps}", env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(re.findall(r"to upload this run: (.*)", done.stderr))
    kept = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    own = (tmp_path / "run" / "tracker.id").read_text().split()[0]
    assert [file.name for run in kept for file in run.glob("*.wandb")] == [f"run-{own}.wandb"] * 2
    assert [[shlex.split(line) for line in lines] for lines in said] == [
        [["wandb", "sync", *map(str, kept[:number])]] for number in (1, 2)
    ]
    rows, config = stored_in(kept[0])
    steps = {row["_step"]: sorted(key.split("/")[0] for key in row) for row in rows}
    assert {row["trainer/global_step"] for row in rows} == steps.keys() == {0, 1, 2, 3}
    having = {kind: [step for step in steps if kind in steps[step]] for kind in ("train", "val")}
    assert having == {"train": [1, 3], "val": [2]}
    assert [row["_step"] for row in rows if "preview/captions" in row] == [0, 3]
    assert rows[0]["preview/captions"] == ["a <v1>"]
    assert "after step 0" in config["lineage"]
    assert stored_in(kept[1])[1]["lineage"].count("after step") == 2
    assert (config["optim.lr"], config["run.steps"], config["methods.lora.rank"]) == (1e-4, 3, 8)
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in events] == ["started", "finished"] * 2


def test_a_copy_of_a_run_has_an_id_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is known by its folder: renamed or restored it is the same run, copied it is not."""
    pytest.importorskip("wandb")
    first, second = tmp_path / "lora" / "x", tmp_path / "copies" / "x"
    own = wandb_facts(first)["id"]
    shutil.copytree(first, second)
    assert capsys.readouterr().out == ""
    other = wandb_facts(second)["id"]
    said = capsys.readouterr().out
    assert f"{second} is a copy of another run's folder" in said and other in said
    assert other != own and wandb_facts(first)["id"] == own
    assert wandb_facts(second)["id"] == other
    shutil.copytree(first, tmp_path / "kept")
    shutil.rmtree(first)
    shutil.copytree(tmp_path / "kept", first)
    assert wandb_facts(first)["id"] == own
    assert capsys.readouterr().out == ""
    (first / "tracker.id").write_text("of-an-earlier-version\n")
    assert wandb_facts(first)["id"] == "of-an-earlier-version"
    shutil.copytree(first, tmp_path / "late")
    assert wandb_facts(tmp_path / "late")["id"] != "of-an-earlier-version"
    assert str(tmp_path) not in (first / "tracker.id").read_text()


def test_steps_that_wandb_has_passed_are_kept_after_its_last(tmp_path: Path) -> None:
    """As online after a crash: wandb knows of later steps than the checkpoint."""
    wandb = pytest.importorskip("wandb")
    settings = wandb.Settings(silent=True, x_disable_meta=True)
    tracker = WandbTracker(save_dir=tmp_path, offline=True, mode="offline", settings=settings)
    run = tracker.experiment
    run._starting_step = run._local_step = 7
    try:
        for step, loss in ((5, 0.5), (6, 0.6), (9, 0.9), (10, 1.0), (10, 1.1)):
            name = "val/loss" if loss == 1.1 else "train/loss"
            tracker.log_metrics({name: loss}, step)
    finally:
        wandb.finish()
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    names = ("_step", "trainer/global_step", "train/loss", "val/loss")
    assert [tuple(row.get(name) for name in names) for row in stored_in(folder)[0]] == [
        (0, 5, 0.5, None), (1, 6, 0.6, None), (9, 9, 0.9, None), (10, 10, 1.0, 1.1)
    ]  # fmt: skip


def test_a_login_is_found_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the file that NETRC names, and else in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    assert not logged_in()
    (tmp_path / "other").write_text("machine api.wandb.ai\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "other"))
    assert logged_in()
    (tmp_path / "other").write_text("machine example.org\n")
    assert not logged_in()
    monkeypatch.delenv("NETRC")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n")
    assert logged_in()
