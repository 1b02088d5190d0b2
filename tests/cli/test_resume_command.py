"""Where a run is, and the command that resumes it, as they are printed: the command is run."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import command, start

from trainer.__main__ import main
from trainer.cli.resume_command import resume_command, says_how_to_resume
from trainer.common.exit_codes import DISK, INTERRUPTED, REQUEUE, TERMINATED, LeaveError
from trainer.config.load import load_recipe

WORDS = [
    "recipe=custom_diffusion", "run.steps=40", "run.batch_size=1", "run.checkpoint_every=1",
    "run.validate_every=0", "preview.every=0", "data.prior_weight=0", "data.class_word=null",
    "data.augment=false", "methods.new_token.init=animal", "tracker=none",
    "evaluate.alone=[a <v1> on a blue background, \"the <v1>'s nose; $HOME\"]",
    "optim.lrs={new_token: 5e-4}",
]  # fmt: skip
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
Printed = pytest.CaptureFixture[str]


def interrupted(folder: Path, number: signal.Signals, *words: str) -> tuple[int, str, Path]:
    """The exit code, the last line and the run folder of a run that a signal ends after a step."""
    printed = folder.with_name("printed")
    printed.mkdir()
    process = start("fit", *WORDS, *words, printed=printed, cwd=folder, env=ENVIRONMENT)
    end = time.monotonic() + 240
    while not list(folder.rglob("checkpoints/step-*/manifest.json")):
        assert process.is_alive(), (printed / "stderr").read_text(encoding="utf-8")
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(120)
    said = (printed / "stderr").read_text(encoding="utf-8").splitlines()
    (run,) = (path.parent for path in folder.rglob("checkpoints"))
    first = [each for each in said if each.startswith("run folder: ")]
    assert first == [f"run folder: {run.relative_to(folder)}"]
    return process.exitcode, said[-1], run


def in_bash(line: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("number", "words", "own"),
    [
        (signal.SIGINT, [], True),
        (signal.SIGTERM, ["run=here and there"], False),
        (signal.SIGINT, ["run.id=mine"], False),
    ],
    ids=["int", "term", "named"],
)
def test_the_printed_command_resumes_the_run(
    number: signal.Signals, words: list[str], own: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    """The one with most to quote is pasted into a shell, the others are split as a shell would."""
    place = tmp_path / "place"
    place.mkdir()
    code, line, run = interrupted(place, number, f"backbone={tiny_folder}", *words)
    assert code == {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}[number]
    assert line.startswith("  python -m trainer fit recipe=custom_diffusion ")
    assert shlex.split(line)[-1].startswith("run=runs/custom_diffusion/") == own
    assert not (run / "adapter.safetensors").exists()
    pasted = number == signal.SIGTERM
    done = in_bash(line, place) if pasted else command(*shlex.split(line)[3:], cwd=place)
    assert done.returncode == 0, done.stderr
    name = run.relative_to(place)
    assert f"{name}: resumes after step " in done.stderr
    assert "run folder: " not in done.stderr  # that line has it
    assert done.stdout == f"{name}\n"
    assert (run / "adapter.safetensors").is_file()
    assert len(list(place.rglob("checkpoints"))) == 1


def test_the_command_has_what_was_typed() -> None:
    words = ["recipe=lora", "data.token=<v1>", "run={steps: 5}", "preview.prompts=[a b, it's]"]
    line = resume_command(words, load_recipe(words), Path("runs/lora/my run"))
    assert shlex.split(line) == [
        "python", "-m", "trainer", "fit", *words, "run=runs/lora/my run"
    ]  # fmt: skip
    for named in ("run=there", "run.id=there"):
        own = [*words[:2], named]
        recipe = load_recipe([word for word in own if word != "run=there"])
        assert shlex.split(resume_command(own, recipe, Path("there")))[4:] == own


def test_a_command_names_the_script_that_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/attention-trainer", "fit"])
    line = resume_command(["recipe=lora"], load_recipe(["recipe=lora"]), Path("there"))
    assert line == "attention-trainer fit recipe=lora run=there"


def test_interrupted_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, capsys: Printed, tmp_path: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trainer.cli.fit.train_recipe", interrupt)
    assert main(["fit", "recipe=custom_diffusion", "run.id=one"]) == INTERRUPTED
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "interrupted; this command goes on with the run:",
        "  python -m trainer fit recipe=custom_diffusion run.id=one",
    ]


@pytest.mark.parametrize("code", [INTERRUPTED, TERMINATED, REQUEUE])
def test_every_signal_says_it(code: int) -> None:
    with pytest.raises(LeaveError) as left, says_how_to_resume("again"):
        raise LeaveError(code, "SIGTERM: saved after step 3 in x")
    assert left.value.code == code
    assert str(left.value) == (
        "SIGTERM: saved after step 3 in x; this command resumes it:\n  again"
    )


@pytest.mark.parametrize("code", [0, DISK])
def test_what_a_resume_does_not_mend_is_left_as_it_is(code: int) -> None:
    with pytest.raises(LeaveError, match=r"^full$"), says_how_to_resume("again"):
        raise LeaveError(code, "full")
