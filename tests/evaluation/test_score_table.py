"""Tables of scores: drift, what is better, which is best, and how it is printed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from trainer.common.score_names import better
from trainer.evaluation.score_table import (
    Table,
    best_lines,
    show_evaluation,
    with_counts,
    with_drift,
)
from trainer.evaluation.shares import Share


def test_drift_is_what_pres_has_risen_over_the_base() -> None:
    table: Table = {
        "base": {"PRES (CLIP)": 0.4, "KID (CLIP)": 0.1},
        "a": {"PRES (CLIP)": 0.55, "KID (CLIP)": 0.2},
        "b": {"PRES (CLIP)": None, "KID (CLIP)": 0.2},
    }
    found = with_drift(table)
    assert list(found["a"]) == ["PRES (CLIP)", "prior drift (CLIP)", "KID (CLIP)"]
    assert found["a"]["prior drift (CLIP)"] == pytest.approx(0.15)
    assert found["base"]["prior drift (CLIP)"] == 0 and "prior drift (CLIP)" not in found["b"]


@pytest.mark.parametrize(
    ("line", "way"),
    [
        ("CLIP-I, large", 1), ("DINO", 1), ("CLIP-T", 1), ("DIV (DINO)", 1),
        ("known sprites", 1), ("fidelity", 1), ("fidelity of known sprites", 1),
        ("second judge: concept", 1),
        ("concept accuracy of <v1>", 1), ("PRES (DINO)", -1), ("prior drift (CLIP)", -1),
        ("KID (CLIP)", -1), ("validation loss", -1), ("frame consistency", 0),
    ],
)  # fmt: skip
def test_which_way_is_better(line: str, way: int) -> None:
    assert better(line) == way


def test_best_by_which_line() -> None:
    table: Table = {
        "base": {"DINO": 0.9},
        "a": {"DINO": 0.5, "KID (DINO)": 0.1, "CLIP-T": 0.3, "DIV (DINO)": None},
        "b": {"DINO": 0.6, "KID (DINO)": 0.2, "CLIP-T": 0.3, "DIV (DINO)": 0.1},
    }
    table["a"]["validation loss"], table["b"]["validation loss"] = 1.0, 0.9
    assert best_lines(table, ["a", "b"]) == [
        "a is best in KID (DINO)",
        "b is best in DINO, validation loss",
    ]


def test_a_file_gets_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many columns are not cut where the output is no terminal."""
    table: Table = {
        f"step {n}": {"CLIP-I": n / 1000, "known sprites": 0.5} for n in range(100, 900, 50)
    }
    out = io.StringIO()
    show_evaluation(table, "of many steps", Console(file=out, width=80))
    printed = out.getvalue()
    assert all(f"step {n} " in printed for n in range(100, 900, 50))
    assert "0.85" in printed and "50.0 %" in printed and "…" not in printed


def test_a_file_says_of_how_many_pictures_each_share_is() -> None:
    table: Table = {"base": {"known sprites": Share(0.5, 128), "CLIP-T": 0.2}}
    assert with_counts(table) == {**table, "pictures": {"known sprites": 128}}
