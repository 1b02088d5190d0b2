"""Run folders as they are found: whole, resumed, half written, damaged, hostile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_runs import lines_of, made_run

from trainer.runs.page.record import read_record, records_in


def test_of_a_step_trained_again_the_later_line_counts(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    lines = [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}, {"step": 3, "a": 3.0}]
    lines_of(run / "metrics.jsonl", [*lines, {"step": 2, "a": 2.5, "time": "x"}])
    assert read_record(run).curves == {"a": {1: 1.0, 2: 2.5, 3: 3.0}}


def test_what_is_no_number_is_a_gap(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    values = [0.5, "nan", "inf", None, True, [1], 2]
    lines_of(run / "metrics.jsonl", [{"step": i, "a": each} for i, each in enumerate(values)])
    curve = read_record(run).curves["a"]
    assert list(curve.values()) == [0.5, None, None, None, None, None, 2]


def test_damaged_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    """As a full disk leaves them, and with steps that are none."""
    run = made_run(tmp_path / "run")
    good = json.dumps({"step": 1, "a": 1.0})
    bad = '{"step": 2, "a"\n[1, 2]\n' + "[" * 100_000 + "\n" + '{"step": "3", "a": 3.0}\n'
    (run / "metrics.jsonl").write_bytes(f"{good}\n{bad}".encode() + b"\xff\xfe\n")
    (run / "plan.json").write_text("{", encoding="utf-8")
    (run / "evaluation.json").write_text("[]", encoding="utf-8")
    record = read_record(run)
    assert record.curves == {"a": {1: 1.0}}
    assert record.problems == [
        "plan.json is damaged and left out",
        "metrics.jsonl: 4 of 6 lines are damaged and left out",
        "evaluation.json is damaged and left out",
    ]


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "not finished; known up to step 40"),
        ([{"event": "started", "step": 0}], "not finished; known up to step 40"),
        (
            [{"event": "started"}, {"event": "stopped", "signal": "SIGTERM", "step": 7}],
            "stopped by SIGTERM after step 7",
        ),
        (
            [{"event": "finished", "step": 30}, {"event": "started", "step": 30}],
            "not finished; known up to step 40",
        ),
        ([{"event": "started"}, {"event": "finished", "step": 40}], "finished after 40 steps"),
    ],
)
def test_how_a_run_has_ended(events: list[dict[str, object]], state: str, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    lines_of(run / "events.jsonl", events)
    assert read_record(run).state == state


def test_a_run_may_be_named_itself(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    runs, said = records_in(run)
    assert [each.folder for each in runs] == [run] and said == []
    assert runs[0].command is not None and "optim.lr=0.0001" in runs[0].command


@pytest.mark.parametrize("text", ["", "- a", "methods: x", "a: !!python/object:os.system {}"])
def test_a_recipe_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="is damaged, or not that of a run"):
        read_record(tmp_path)
