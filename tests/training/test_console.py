"""Who speaks to the user."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from trainer.training import console


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_speaks_alone(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=said))
    monkeypatch.setattr(console.rank_zero_only, "rank", rank, raising=False)
    console.say("resumes after step 3 [bold]")
    assert said.getvalue() == ("resumes after step 3 [bold]\n" if rank == 0 else "")


def test_it_speaks_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    """stdout is for what a verb gives: the run folder, paths of pictures."""
    assert Console(stderr=True).file is not Console().file
    assert console.console.stderr


def test_a_long_line_stays_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is printed can be copied."""
    said = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=said, width=20))
    monkeypatch.setattr(console.rank_zero_only, "rank", 0, raising=False)
    console.say("python -m trainer fit recipe=lora run=runs/lora/1")
    assert said.getvalue() == "python -m trainer fit recipe=lora run=runs/lora/1\n"
