"""A run on two nodes of a real Slurm, for `scale.py`: interrupted by its time limit and by a node
that fails, and compared with one that nothing interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import Bars
from _scale_ranks import trained, words_with
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from slurm_cluster import Cluster, missing_for_slurm, running_cluster

PATIENCE = 300  # seconds for a start of the job, on a busy machine


def slurm(bars: Bars) -> None:
    """The values of the adapter that differ from those of an unbroken run."""
    if (missing := missing_for_slurm()) is not None:
        bars.note("slurm", missing)
        return
    with tempfile.TemporaryDirectory() as scratch:
        _slurm(bars, Path(scratch))


def _slurm(bars: Bars, folder: Path) -> None:
    steps = f"run.steps={80 if bars.quick else 200}"
    words = ("run.batch_size=2", "run.checkpoint_every=5", steps)
    trained(folder / "unbroken", "run.devices=2", *words)
    (folder / "daemons").mkdir()
    with running_cluster(folder / "daemons") as cluster:
        run = _interrupted(cluster, folder, words_with(*words))
    whole, broken = (load_file(run / "adapter.safetensors") for run in (folder / "unbroken", run))
    assert whole.keys() == broken.keys()
    differ = sum(int((whole[name] != broken[name]).sum()) for name in whole)
    bars.at_most("slurm_values_that_differ", differ, 0)


def _interrupted(cluster: Cluster, folder: Path, words: list[str]) -> Path:
    """Trains on both nodes of the first partition; returns the run folder."""
    command = [sys.executable, "-m", "trainer", "slurm", *words, "nodes=2", "time=20", "signal=60"]
    asked = [*command, "partition=first", "cpus=1", "submit=true"]
    said = subprocess.run(
        asked, cwd=folder, env=cluster.environment, check=True, capture_output=True, text=True
    )
    job = said.stdout.split()[-1]
    run = folder / "runs" / "lora" / job
    _freeze(cluster, job, run)
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    cluster.wait(lambda: cluster.state(job)["Restarts"] == "1", PATIENCE)
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    _freeze(cluster, job, run)
    cluster.kill_node("n2")
    cluster.wait(lambda: "down" in cluster.ask("sinfo", "-h", "-n", "n2", "-o", "%T"), PATIENCE)
    cluster.kill_left(job, "n2")
    cluster.start_node("n2")
    cluster.wait(lambda: cluster.state(job)["JobState"] in ("COMPLETED", "FAILED"), PATIENCE)
    assert cluster.state(job)["Restarts"] == "2", cluster.logs()
    return run


def _freeze(cluster: Cluster, job: str, run: Path) -> None:
    """Stops the second rank in the middle of the run."""
    path = run / "metrics.jsonl"

    def steps() -> int:
        return len(path.read_text().splitlines()) if path.is_file() else 0

    begun = steps()
    cluster.wait(lambda: steps() > begun + 6, PATIENCE)
    for pid in cluster.processes(job, "n2"):
        os.kill(pid, signal.SIGSTOP)
