"""The Slurm job, run by bash with an `srun` that writes down what it was asked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "slurm" / "fit.sbatch"
SRUN = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "$RECORD.arguments"
printf '%s\\0' "$TRAINER_RUN_ID" "$SRUN_CPUS_PER_TASK" "$OMP_NUM_THREADS" > "$RECORD.environment"
exit "${SRUN_EXIT:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "$RECORD.requeued"
"""
JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_CPUS_PER_TASK": "8",
}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def submit(
    folder: Path, *words: str, scontrol: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs the script in `folder` as Slurm would: under bash, in the environment of a job."""
    tools = folder / "bin"
    tools.mkdir()
    for name, text in {"srun": SRUN, **({"scontrol": SCONTROL} if scontrol else {})}.items():
        (tools / name).write_text(text, encoding="utf-8")
        (tools / name).chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "RECORD": str(folder / "record"), **JOB, **variables}
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def recorded(folder: Path, kind: str) -> list[str]:
    return (folder / f"record.{kind}").read_text(encoding="utf-8").split("\0")[:-1]


def options() -> dict[str, str]:
    """The `#SBATCH --name=value` lines."""
    lines = re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", SCRIPT.read_text(encoding="utf-8"), re.M)
    names = [name for name, _ in lines]
    assert len(names) == len(set(names)), "an option is given twice"
    return dict(lines)


def test_srun_starts_one_fit_with_the_words_as_given(tmp_path: Path) -> None:
    words = (
        "recipe=custom_diffusion",
        "prompt=a b",
        "preview.prompts=[a <v1>, a * $HOME 'x']",
        "x=",
    )
    result = submit(tmp_path, *words)
    assert result.returncode == 0, result.stderr
    assert recorded(tmp_path, "arguments") == [
        *("python", "-m", "trainer", "fit"),
        *words,
        *("run.devices=4", "run.nodes=2"),
    ]


def test_without_words_only_the_job_is_added(tmp_path: Path) -> None:
    assert submit(tmp_path).returncode == 0
    assert recorded(tmp_path, "arguments")[4:] == ["run.devices=4", "run.nodes=2"]


def test_all_ranks_get_one_run_id_and_their_cores(tmp_path: Path) -> None:
    submit(tmp_path, "recipe=custom_diffusion", TRAINER_RUN_ID="left over")
    assert recorded(tmp_path, "environment") == ["4711", "8", "8"]


def test_one_task_a_device() -> None:
    asked = options()
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert "ntasks" not in asked
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(re.findall(r"^srun ", text, re.M)) == 1
    assert 'run.devices="$SLURM_NTASKS_PER_NODE"' in text


@pytest.mark.parametrize(
    ("variables", "job"),
    [({}, "4711"), ({"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "11"}, "4700_11")],
    ids=["job", "array"],
)
def test_a_run_that_was_saved_in_time_is_requeued(
    variables: dict[str, str], job: str, tmp_path: Path
) -> None:
    assert submit(tmp_path, SRUN_EXIT="75", **variables).returncode == 75
    assert recorded(tmp_path, "requeued") == ["requeue", job]


@pytest.mark.parametrize(
    "variables",
    [{"SRUN_EXIT": "143"}, {"SRUN_EXIT": "0"}, {"SRUN_EXIT": "75", "SLURM_RESTART_COUNT": "20"}],
    ids=["cancelled", "finished", "often-enough"],
)
def test_any_other_is_not(variables: dict[str, str], tmp_path: Path) -> None:
    assert submit(tmp_path, **variables).returncode == int(variables["SRUN_EXIT"])
    assert not (tmp_path / "record.requeued").exists()


def test_without_scontrol_the_job_says_so(tmp_path: Path) -> None:
    result = submit(tmp_path, SRUN_EXIT="75", scontrol=False)
    assert result.returncode == 75
    assert "not requeued: submit the same words again" in result.stderr


def test_the_signal_comes_before_the_limit_and_to_the_tasks() -> None:
    assert options()["signal"] == "USR1@180"  # with B: only the batch shell would get it


def test_a_failed_run_fails_the_job(tmp_path: Path) -> None:
    assert submit(tmp_path, "recipe=nonsense", SRUN_EXIT="78").returncode == 78


def test_outside_a_job_the_missing_variable_is_named(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"]}
    result = subprocess.run(
        ["bash", str(SCRIPT)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode != 0
    assert "SLURM_JOB_ID" in result.stderr
