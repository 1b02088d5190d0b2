"""`report`: the page of a run, and of a folder of runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import made_run

from trainer.__main__ import main

Printed = pytest.CaptureFixture[str]


def test_it_writes_the_page_of_a_run_and_of_several(tmp_path: Path, capsys: Printed) -> None:
    run = made_run(tmp_path / "lora" / "x")
    made_run(tmp_path / "lora" / "y")
    (tmp_path / "other").mkdir()
    assert main(["report", f"run={run}"]) == 0
    assert capsys.readouterr() == (f"{run / 'report.html'}\n", "")
    for word in (str(tmp_path), f"runs={tmp_path}"):
        assert main(["report", word]) == 0
        out, err = capsys.readouterr()
        assert out == f"{tmp_path / 'report.html'}\n"
        assert err == f"passed over: {tmp_path / 'other'}: no run is in it\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give run=<a run folder> or runs=<a folder of runs>"),
        (["run=a", "runs=b"], "give run=<a run folder> or runs=<a folder of runs>"),
        (["a", "b"], "report takes one folder, and 2 are given"),
        (["run=none"], "none: no such folder"),
        (["none"], "none: no such folder; name one with runs"),
        (["rum=x"], "rum: no such key; did you mean run?"),
    ],
)
def test_bad_input_is_answered(words: list[str], said: str, capsys: Printed) -> None:
    assert main(["report", *words]) == 78
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_it_imports_no_torch(tmp_path: Path) -> None:
    run = made_run(tmp_path / "lora" / "x")
    code = (
        "import sys; from trainer.__main__ import main; "
        f"code = main(['report', 'run={run}']); sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
