"""What long work shows: lines with the time left where there is no terminal, a bar where there is
one, and nothing from any process but the first."""

from __future__ import annotations

from functools import partial

import pytest
from rich.console import Console

from trainer.common import long_work as module
from trainer.common.long_work import duration, long_work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines_at_intervals(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with long_work("class images", 160, 40) as advance:
        for _ in range(30):
            clock[0] += 4
            advance(4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "class images: 40 of 160 are there already"
    # twelve seconds, three batches of four: one a second, so 108 are 108 seconds
    assert lines[1] == "class images: 52 of 160, about 1.8 min left"
    assert lines[-1] == "class images: 160 of 160 after 2.0 min"
    assert len(lines) == 1 + 9 + 1


def test_short_work_is_one_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with long_work("latents", 7) as advance:
        clock[0] += 3
        advance(7)
    assert capsys.readouterr().err == "latents: 7 of 7 after 3 s\n"


def test_what_is_found_leaves_the_count(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """The time left is that of the pieces which are to be made: here one a second."""
    with long_work("pictures", 100) as work:
        work.found(60)
        clock[0] += 10
        work(10)
        clock[0] += 30
        work(30)
    assert capsys.readouterr().err.splitlines() == [
        "pictures: 10 of 40, about 30 s left",
        "pictures: 40 of 40 after 40 s",
    ]


def test_nothing_done_yet_says_nothing(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first batch was there already, and half a minute has passed."""
    with long_work("pictures", 40) as work:
        work.found(16)
        clock[0] += 30
        work(0)
        assert capsys.readouterr().err == ""
        clock[0] += 12
        work(12)
    assert capsys.readouterr().err == "pictures: 12 of 24, about 42 s left\n"


def test_a_terminal_has_a_bar_of_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "Console", partial(Console, force_terminal=True, width=100))
    with long_work("pictures", 100) as work:
        work.found(60)
        work(40)
    assert "40/40" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_other_processes_say_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "1")
    with long_work("latents", 7) as advance:
        advance(7)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "text"), [(12, "12 s"), (150, "2.5 min"), (9000, "2.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
