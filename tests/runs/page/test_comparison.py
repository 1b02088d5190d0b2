"""Runs beside each other: which is best, what differs, and what they are called."""

from __future__ import annotations

from pathlib import Path

from made_runs import made_run

from trainer.runs.page.comparison import beside_each_other, best_by, short_names, way
from trainer.runs.page.record import read_record


def test_the_best_is_the_first_by_the_way_of_each_number() -> None:
    numbers = {
        "a": {"val/loss": 0.2, "train/clips_per_second": 5.0, "concept accuracy": 0.5, "lr/x": 1},
        "b": {"val/loss": 0.1, "train/clips_per_second": 9.0, "concept accuracy": 0.9, "lr/x": 2},
        "c": {"val/loss": 0.3, "PRES (CLIP)": 0.1},
    }  # fmt: skip
    found = best_by(numbers)
    assert found == {
        "val/loss": [("b", 0.1), ("a", 0.2), ("c", 0.3)],
        "train/clips_per_second": [("b", 9.0), ("a", 5.0)],
        "concept accuracy": [("b", 0.9), ("a", 0.5)],
    }
    ways = {"train/loss_t062": -1, "train/peak_memory_mib": -1, "train/mfu": 1, "KID (CLIP)": -1}
    assert {name: way(name) for name in ways} == ways and way("data/samples") == 0


def test_what_differs_is_listed_and_nothing_else(tmp_path: Path) -> None:
    one = made_run(tmp_path / "lora" / "x")
    two = made_run(tmp_path / "dora" / "x", lr=1e-3, steps=20)
    text = (two / "recipe.yaml").read_text(encoding="utf-8")
    (two / "recipe.yaml").write_text(text.replace("rank: 4", "alpha: 2"), encoding="utf-8")
    table = beside_each_other([read_record(one), read_record(two)])
    assert list(table.differences) == [
        ("methods.lora.alpha", ["-", "2"]),
        ("methods.lora.rank", ["4", "-"]),
        ("optim.lr", ["0.0001", "0.001"]),
        ("run.steps", ["40", "20"]),
    ]
    assert list(table.names) == ["lora/x", "dora/x"]
    rows = {row.name: list(row.values) for row in table.runs}
    assert rows["dora/x"][0] == "finished after 20 steps" and rows["dora/x"][4] == "0.15"
    titles = [each.title for each in table.charts]
    assert "val/loss" in titles and "train/loss_t062" not in titles
    (loss,) = [each for each in table.charts if each.title == "val/loss"]
    assert [line.name for line in loss.lines] == ["lora/x", "dora/x"]


def test_runs_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    places = [made_run(tmp_path / name) for name in ("a/x/1", "a/y/1", "b/x/1")]
    runs = [read_record(place) for place in places]
    assert short_names(runs[:2]) == ["x/1", "y/1"]
    assert short_names(runs) == ["a/x/1", "a/y/1", "b/x/1"]
    assert short_names(runs[:1]) == ["1"]
