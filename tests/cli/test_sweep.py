"""`sweep`: every run trains what `fit` trains, Ctrl-C ends all and the same command goes on, and
the table says which is best by what."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from forking_python import Python, forking_python
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.cli.sweep_processes import Process, train_each
from trainer.cli.sweep_table import Column, RunRow, best_of, row_of, show_table
from trainer.common.exit_codes import BAD_RECIPE, INTERRUPTED, NONFINITE
from trainer.config.load import load_recipe
from trainer.training.fit import fit

Printed = pytest.CaptureFixture[str]
STEPS = 60


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Python]:
    with forking_python(tmp_path_factory.mktemp("python")) as made:
        yield made


@pytest.fixture
def words(
    tiny_folder: Path, tmp_path: Path, python: Python, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Of a sweep in the folder `tmp_path/sweep`, whose processes are forked."""
    monkeypatch.setattr(sys, "executable", str(python.path))
    tree = {
        "backbone": str(tiny_folder),
        "data": {"source": "world", "count": 6, "validation": 2},
        "methods": {"lora": {"sites": "cross", "rank": 2}},
        "run": {
            "device": "cpu", "steps": STEPS, "batch_size": 2, "log_every": 1,
            "checkpoint_every": 0, "validate_every": STEPS,
        },
        "preview": {"every": 0},
        "tracker": "none",
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    return [f"recipe={tmp_path / 'mine.yaml'}", f"sweep={tmp_path / 'sweep'}"]


def interrupted_when(happened: Callable[[], object]) -> threading.Thread:
    """Ctrl-C to this process, when something has happened."""

    def wait() -> None:
        while not happened():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.skipif(os.name == "nt", reason="needs signals to processes")
def test_ctrl_c_ends_a_sweep_and_the_same_command_goes_on(
    words: list[str], tmp_path: Path, capsys: Printed
) -> None:
    given = ["sweep", *words, "optim.lr=[1e-3,1e-4]"]
    first, second = tmp_path / "sweep" / "lr_0.001", tmp_path / "sweep" / "lr_0.0001"
    thread = interrupted_when((first / "metrics.jsonl").is_file)
    assert main(given) == INTERRUPTED
    thread.join()
    out, err = capsys.readouterr()
    assert "the sweep was stopped; the same command goes on with it" in err
    assert "stopped at step" in out and "not begun" in out and not second.exists()
    assert "best by train/loss: no finished run has logged it" in out

    assert main(given) == 0
    events = [json.loads(line)["event"] for line in (first / "events.jsonl").open()]
    assert events == ["started", "stopped", "started", "finished"]
    recipe = load_recipe([words[0], "optim.lr=1e-3"])
    whole = load_file(fit(recipe, tmp_path / "whole") / "adapter.safetensors")
    own = load_file(first / "adapter.safetensors")
    assert own.keys() == whole.keys() and all(own[name].equal(whole[name]) for name in own)

    capsys.readouterr()
    assert main(given) == 0
    out = capsys.readouterr().out
    assert out.count("finished before") == 2 and ": started" not in out
    facts = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [run["values"] for run in facts["runs"]] == [{"optim.lr": 1e-3}, {"optim.lr": 1e-4}]
    losses = {run["run"]: run["val/loss"] for run in facts["runs"]}
    best = min(losses, key=losses.__getitem__)
    assert facts["best"]["val/loss"] == best
    assert f"best by val/loss: {best}, {losses[best]:.6g}" in out

    assert main([*given, "methods.lora.rank=3"]) == BAD_RECIPE
    err = capsys.readouterr().err
    assert "another methods.lora.rank; give another folder for this sweep by sweep=" in err


def test_a_run_that_fails_is_named_and_the_others_go_on(
    words: list[str], tmp_path: Path, capsys: Printed
) -> None:
    assert main(["sweep", *words, "run.steps=6", "optim.lr=[1e30,1e-4]", "at_once=2"]) == NONFINITE
    out, err = capsys.readouterr()
    assert "1 of 2 runs failed, the first of them lr_1e_30-" in err and ".log beside its" in err
    assert f"failed with {NONFINITE}" in out and "best by train/loss: lr_0.0001, " in out
    (log,) = (tmp_path / "sweep").glob("lr_1e_30-*.log")
    assert "not finite" in log.read_text()


def test_the_table_trains_nothing(words: list[str], tmp_path: Path, capsys: Printed) -> None:
    assert main(["sweep", *words, "run.seed=[1,2]", "table=true"]) == 0
    assert capsys.readouterr().out.count("not begun") == 2
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("run.steps=5", "no key has several values"),
        ("run.seed=[1,2] at_once=0", "at_once=0: a whole number is needed, at least 1"),
        ("run.batch_size=[2,x]", "run.batch_size='x'"),
        ("run.seed=[1,2] better=worse", "better='worse'"),
        ("run.seed=[1,2] tabel=true", "tabel: no such key"),
    ],
)
def test_what_is_wrong_is_said_before_any_run(
    word: str, why: str, words: list[str], tmp_path: Path, capsys: Printed
) -> None:
    assert main(["sweep", words[0], *word.split(" ")]) == BAD_RECIPE
    err = capsys.readouterr().err
    assert err.startswith("error: ") and why in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.skipif(os.name == "nt", reason="needs sh")
def test_runs_at_the_same_time_have_a_gpu_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES"\nsleep 0.5\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all")
    runs = [Process(n, ("x",), log=tmp_path / n, one_gpu=n != "d") for n in ("a", "b", "c", "d")]
    assert train_each(runs, 2, ["3", "5"]) == {"a": 0, "b": 0, "c": 0, "d": 0}
    seen = [(tmp_path / name).read_text().strip() for name in ("a", "b", "c", "d")]
    assert set(seen[:2]) == {"3", "5"} and seen[2] in ("3", "5") and seen[3] == "all"


@pytest.mark.skipif(os.name == "nt", reason="needs sh")
def test_more_runs_than_gpus_share_them_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES"\nsleep 0.5\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    names = ("a", "b", "c", "d")
    runs = [Process(name, ("x",), log=tmp_path / name, one_gpu=True) for name in names]
    train_each(runs, 4, ["3", "5"])
    seen = [(tmp_path / name).read_text().strip() for name in names]
    assert sorted(seen) == ["3", "3", "5", "5"]


def test_a_table_shows_values_as_they_are(capsys: Printed) -> None:
    """Brackets are no markup."""
    row = RunRow("a", {"preview.negative": "[/red] é"}, state="finished", numbers={"x": 0.5})
    show_table([row], [Column("x", "lower")])
    assert '"[/red] é"' in capsys.readouterr().out


def test_the_best_is_the_lowest_or_the_highest_of_those_that_are_finished() -> None:
    rows = [
        RunRow(name, {}, state=state, numbers={} if value is None else {"x": value})
        for name, state, value in (
            ("a", "finished", 2.0), ("b", "finished", 3.0), ("c", "stopped at step 3", 1.0),
            ("d", "stopped at step 3", 4.0), ("e", "finished", None),
        )
    ]  # fmt: skip
    found = [best_of(rows, Column("x", better)) for better in ("lower", "higher")]
    assert [row and row.name for row in found] == ["a", "b"]
    assert best_of(rows, Column("y", "lower")) is None


def test_a_number_that_is_not_finite_is_no_best(tmp_path: Path) -> None:
    rows = []
    for name, values in {"a": ["nan"], "b": [3.0], "c": [5.0, 2.0, "nan"]}.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": i, "val/loss": each}) for i, each in enumerate(values)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
        (tmp_path / name / "adapter.safetensors").touch()
        rows.append(
            row_of(name, {}, tmp_path / name, columns=[Column("val/loss", "lower")], code=0)
        )
    found = best_of(rows, Column("val/loss", "lower"))
    assert found is not None and (found.name, found.numbers["val/loss"]) == ("c", 2.0)


def test_numbers_are_read_once_for_each_step(tmp_path: Path) -> None:
    """A run that was killed has logged some steps twice, and perhaps half a line."""
    steps = [*range(1, 13), 11, 12, 13, 14]
    lines = [json.dumps({"step": step, "train/loss": float(step)}) for step in steps]
    lines += [json.dumps({"step": 14, "val/loss": value}) for value in (7.0, 5.0)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 15, "tra']))
    columns = [Column("train/loss", "lower"), Column("val/loss", "lower")]
    row = row_of("a", {}, tmp_path, columns=columns, code=None)
    assert row.state == "stopped at step 14"
    assert row.numbers == {"train/loss": sum(range(5, 15)) / 10, "val/loss": 5.0}
