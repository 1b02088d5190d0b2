"""`slurm`: the batch script it prints is `slurm/fit.sbatch` with the words of the recipe, bash runs
what it says, and what it cannot say is refused in a sentence. On a real Slurm:
`tests/faults/test_on_slurm.py`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.cli.slurm import seconds_of
from trainer.common.exit_codes import BAD_RECIPE

READABLE = Path(__file__).parent.parent.parent / "slurm" / "fit.sbatch"
OPTION = re.compile(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", re.M)
FAKE = '#!/usr/bin/env bash\nprintf "%s\\0" "$@" > "$RECORD"\nexit "${EXIT:-0}"\n'
Printed = pytest.CaptureFixture[str]

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def rendered(capsys: Printed, *words: str, recipe: str = "recipe=tiny_unet") -> str:
    assert main(["slurm", recipe, *words]) == 0
    return capsys.readouterr().out


def options(text: str) -> dict[str, str]:
    found = OPTION.findall(text)
    assert len(dict(found)) == len(found), "an option is given twice"
    return dict(found)


def body(text: str) -> str:
    return text[text.index("set -euo pipefail") :]


def started(text: str, folder: Path, **variables: str) -> list[str]:
    """The words that `srun` gets when bash runs a script with an `srun` that writes them down."""
    tools = folder / "bin"
    tools.mkdir()
    (tools / "srun").write_text(FAKE)
    (tools / "srun").chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    environment = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "RECORD": str(folder / "record"),
        **job, **variables,
    }  # fmt: skip
    ended = subprocess.run(
        ["bash"],
        input=text,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    return (folder / "record").read_text().split("\0")[:-1]


def test_it_is_the_script_that_a_reader_finds(capsys: Printed) -> None:
    """But for the words, and for what this recipe has otherwise."""
    text = rendered(capsys, "nodes=2", "devices=4")
    readable = READABLE.read_text(encoding="utf-8")
    assert options(text) == options(readable) | {"job-name": "tiny_unet"}
    assert body(text).replace("\nset -- recipe=tiny_unet\n", "", 1) == body(readable)


@needs_bash
def test_the_words_reach_the_program_as_they_were_given(capsys: Printed, tmp_path: Path) -> None:
    words = ["preview.prompts=[it's a fox * $HOME]", "run.steps=5"]
    text = rendered(capsys, *words, "nodes=2", "devices=4", "run=runs/a b")
    assert started(text, tmp_path) == [
        *("python", "-m", "trainer", "fit", "recipe=tiny_unet"),
        *words,
        "run=runs/a b",
        *("run.devices=4", "run.nodes=2"),
    ]


@needs_bash
def test_words_of_several_lines_are_no_commands(capsys: Printed, tmp_path: Path) -> None:
    """Also where the script says what it was made by."""
    prompts = "preview.prompts=[a\n--nodes=9\ntouch evil]"
    text = rendered(capsys, prompts)
    assert started(text, tmp_path)[5] == prompts and not (tmp_path / "evil").exists()
    assert options(text[: text.index("set -euo")])["nodes"] == "1"


@needs_bash
def test_each_task_of_an_array_trains_one_case(capsys: Printed, tmp_path: Path) -> None:
    words = ("run.steps=[5,6]", "run.seed=[1,2]", "array=true", "at_once=2", "sweep=all")
    text = rendered(capsys, *words)
    assert options(text)["array"] == "0-3%2" and options(text)["output"] == "slurm-%x-%A_%a.log"
    assert "TRAINER_RUN_ID" not in text  # the folders are named
    own = started(text, tmp_path, SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_JOB_ID="6")
    assert own[4:8] == [
        "recipe=tiny_unet", "run.steps=6", "run.seed=1", "run=all/steps_6-seed_1",
    ]  # fmt: skip


@needs_bash
@pytest.mark.parametrize(
    ("image", "before"),
    [
        ("here/fit.sif", ["apptainer", "exec", "--nv", "--bind", "/a:/b,/c:/d", "here/fit.sif"]),
        ("nvcr.io#fit", ["--container-image=nvcr.io#fit", "--container-mounts=/a:/b,/c:/d"]),
    ],
)
def test_a_container_is_started_on_each_node(
    image: str, before: list[str], capsys: Printed, tmp_path: Path
) -> None:
    text = rendered(capsys, f"container={image}", "mounts=[/a:/b,/c:/d]", "setup=export A=1")
    got = started(text, tmp_path)
    assert got[: len(before) + 4] == [*before, "python", "-m", "trainer", "fit"]
    assert text.index("export A=1 || exit 1") < text.index("set -euo pipefail")


def test_what_is_a_number_to_yaml_is_a_text_to_slurm(capsys: Printed) -> None:
    given = {"partition": "on", "account": "0042", "qos": "1e3", "constraint": "1:30", "mem": "010"}
    found = options(
        rendered(capsys, *(f"{key}={text}" for key, text in given.items()), "name=1.10")
    )
    assert found | given | {"job-name": "1.10"} == found
    assert "qos" not in options(rendered(capsys, "qos=null", "account="))


def test_the_options_of_the_cluster(capsys: Printed) -> None:
    words = ("partition=gpu", "account=17", "qos=long", "mem=64G", "gres=gpu:a100:2", "cpus=3")
    found = options(
        rendered(capsys, *words, "time=2-12:00:00", "signal=300", "name=mine", "constraint=a&b")
    )
    assert found | {
        "partition": "gpu", "account": "17", "qos": "long", "mem": "64G", "gres": "gpu:a100:2",
        "cpus-per-task": "3", "time": "2-12:00:00", "signal": "USR1@300", "job-name": "mine",
        "constraint": "a&b",
    } == found  # fmt: skip
    assert "gpus-per-node" not in found
    assert "gpus-per-node" not in options(rendered(capsys, "run.device=cpu"))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("2-12", 216000), ("1-0:0:1", 86401)],
)
def test_a_time_limit_as_slurm_reads_it(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


REFUSED = {
    "time=3": "time=3 leaves no time to train: the run is saved signal=180 seconds before it",
    "time=soon": "no time above 0; give hours as in 04:00:00",
    "time=0": "no time above 0",
    "time=1:2:3:4": "no time above 0",
    "nodes=0": "nodes=0: a whole number is needed, at least 1",
    "nodes=3": "run.batch_size=32 does not divide by run.devices x run.nodes = 3",
    "partition='a b'": "'a b' is not one word of Slurm's",
    "mem=lots": "'lots' is not an amount of memory, as in 64G",
    "name=bash": "bash is what Slurm calls a shell on a node; give another name",
    "name='a b'": "'a b' is not a name of letters",
    "setup=a\nb": "setup is more than one line",
    "mounts=[/a:/b]": "mounts are of a container; give container=<image> too",
    "container=a mounts=[/a]": "/a is not <folder>:<folder in the container>",
    "at_once=2": "at_once= is for a sweep; give array=true too",
    "array=true": "no key has several values; give some, as in optim.lr=[1e-4,3e-4]",
    "array=true run=a": "run= names one run folder, and a sweep has several; give sweep=",
    "run.device=cuda:1": "run.device=cuda:1 is one GPU of one machine; give run.device=cuda",
    "nodes=2 run.nodes=2": "nodes and run.nodes say the same; give one",
    "out=none/here": "out=none/here is no file in a folder that exists",
    "optim.lrr=1": "optim.lrr: no such key; did you mean optim.lr?",
    "time=9 tim=4": "tim: no such key",
    "run.strategy=hsdp": "strategy=hsdp shards over several devices, and this run has one",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_job_cannot_be_is_refused_in_a_sentence(
    words: str, capsys: Printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    split = [words] if "'" in words else words.split(" ")
    assert main(["slurm", "recipe=tiny_unet", *split]) == BAD_RECIPE
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert REFUSED[words] in err


def test_a_file_is_written_and_never_over_another(capsys: Printed, tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    assert rendered(capsys, f"out={path}") == f"{path}\n"
    path.write_text("mine")
    assert main(["slurm", "recipe=tiny_unet", f"out={path}"]) == BAD_RECIPE
    assert "exists, and is not written over; give another name" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_a_file_in_the_home_folder(
    capsys: Printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert rendered(capsys, "out=~/job.sbatch") == f"{tmp_path / 'job.sbatch'}\n"
    assert (tmp_path / "job.sbatch").is_file()


def test_without_sbatch_a_job_is_not_submitted(
    capsys: Printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["slurm", "recipe=tiny_unet", "submit=true"]) == BAD_RECIPE
    assert "there is no sbatch on this machine; give it on a login node" in capsys.readouterr().err


@needs_bash
def test_what_sbatch_says_of_a_job_is_passed_on(
    capsys: Printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "sbatch"
    fake.write_text('#!/bin/sh\necho "Invalid account" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert main(["slurm", "recipe=tiny_unet", "submit=true"]) == 1
    assert "error: sbatch refused the job: Invalid account" in capsys.readouterr().err
