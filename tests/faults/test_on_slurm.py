"""Jobs of `slurm` on a real Slurm: the time limit, a node that fails, a cancelled job, an array.
What each of them trains is that of a run which nothing has interrupted.

They run at the same time, as most of it is waiting: Slurm looks at time limits every 30 seconds.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command
from forking_python import Python, forking_python
from ranks import on_two_ranks
from safetensors.torch import load_file
from slurm_cluster import Cluster, missing_for_slurm, running_cluster

MISSING = missing_for_slurm()
pytestmark = [
    pytest.mark.faults,
    pytest.mark.ddp,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]
STEPS = 40
WORDS = (
    "recipe=lora", "run.device=cpu", f"run.steps={STEPS}", "run.batch_size=2", "tracker=none",
    "data.prior_weight=0", "preview.every=0", "run.validate_every=0", "run.checkpoint_every=5",
    "run.log_every=1",
)  # fmt: skip
RATES = ("0.001", "0.002", "0.003")


@dataclass
class Job:
    """A job that was submitted. python: which starts its ranks; folder: its run folder;
    log: what all of its ranks print."""

    cluster: Cluster
    python: Python
    number: str
    folder: Path
    log: Path

    def ranks(self, node: str) -> list[int]:
        """Its processes that train on a node."""
        clients = self.cluster.processes(self.number, node)
        return list(filter(None, map(self.python.fork_of, clients)))

    def steps(self) -> int:
        """The optimiser steps that its run has logged."""
        path = self.folder / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.is_file() else 0

    def freeze(self, node: str) -> None:
        """Stops its rank on a node in the middle of the run; the other one waits for it."""
        begun = self.steps()
        self.cluster.wait(lambda: self.steps() > begun + 5, 120)
        found = self.ranks(node)
        for pid in found:
            os.kill(pid, signal.SIGSTOP)
        assert found and self.steps() < STEPS

    def is_in(self, *states: str) -> bool:
        return self.cluster.state(self.number)["JobState"] in states

    def finish(self) -> None:
        self.cluster.wait(lambda: self.is_in("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), 120)
        assert self.is_in("COMPLETED"), self.log.read_text()[-3000:] + self.cluster.logs()

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [found for line in lines if (found := json.loads(line))["event"] == kind]


def submitted(cluster: Cluster, folder: Path, *words: str) -> str:
    """The number of a job that the program has submitted from a folder."""
    ended = command(
        *("slurm", *WORDS, "cpus=1", "submit=true", *words), cwd=folder, env=cluster.environment
    )
    assert ended.returncode == 0, ended.stderr
    found = re.search(r"Submitted batch job (\d+)", ended.stdout)
    assert found is not None, ended.stdout
    return found[1]


def two_nodes(cluster: Cluster, python: Python, folder: Path, partition: str) -> Job:
    number = submitted(cluster, folder, "nodes=2", "time=10", "signal=60", f"partition={partition}")
    log = folder / f"slurm-lora-{number}.log"
    return Job(cluster, python, number, folder / "runs" / "lora" / number, log)


def time_limit(cluster: Cluster, python: Python, folder: Path) -> Job:
    """A job whose time is nearly up in the middle of its run."""
    job = two_nodes(cluster, python, folder, "first")
    job.freeze("n2")
    cluster.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=1")
    # before its signal Slurm sends another one, by which what is stopped goes on
    cluster.wait(lambda: cluster.state(job.number)["Restarts"] == "1")
    cluster.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    job.finish()
    return job


def node_failure(cluster: Cluster, python: Python, folder: Path) -> Job:
    """A job one of whose nodes fails in the middle of its run, and comes back."""
    job = two_nodes(cluster, python, folder, "second")
    job.freeze("n4")
    cluster.kill_node("n4")
    cluster.wait(lambda: "down" in cluster.ask("sinfo", "-h", "-n", "n4", "-o", "%T"))
    cluster.kill_left(job.number, "n4")
    cluster.start_node("n4")
    job.finish()
    return job


def sweep(cluster: Cluster, python: Python, folder: Path) -> list[Job]:
    """An array of three, the last of which is cancelled in the middle of its run."""
    rates = f"optim.lr=[{','.join(RATES)}]"
    number = submitted(cluster, folder, rates, "array=true", "partition=first", "sweep=sweep")
    jobs = []
    for task, rate in enumerate(RATES):
        log = folder / f"slurm-lora-{number}_{task}.log"
        jobs.append(Job(cluster, python, f"{number}_{task}", folder / "sweep" / f"lr_{rate}", log))
    last = jobs[-1]
    cluster.wait(lambda: last.steps() > 0, 120)
    shown = cluster.state(last.number)
    Job(cluster, python, shown["JobId"], last.folder, last.log).freeze(shown["NodeList"])
    cluster.ask("scancel", last.number)  # which first lets it go on
    for job in jobs[:-1]:
        job.finish()
    cluster.wait(lambda: not last.is_in("RUNNING", "COMPLETING"))
    return jobs


Scenario = Callable[[Cluster, Python, Path], Any]
SCENARIOS: tuple[Scenario, ...] = (time_limit, node_failure, sweep)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Any]]]:
    """What each of `SCENARIOS` returns, by its name."""
    root = tmp_path_factory.mktemp("slurm")
    (root / "daemons").mkdir()
    with (
        forking_python(root / "python") as python,
        running_cluster(root / "daemons", python.path) as cluster,
        ThreadPoolExecutor(len(SCENARIOS)) as pool,
    ):
        found = {}
        for scenario in SCENARIOS:
            own = root / scenario.__name__
            own.mkdir()
            found[scenario.__name__] = pool.submit(scenario, cluster, python, own)
        yield found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The tensors of a run on two ranks that nothing interrupts."""
    folder = tmp_path_factory.mktemp("unbroken")
    words = ("fit", *WORDS, "run.devices=2", "run=run")
    ended = on_two_ranks(*words, printed=folder / "printed", cwd=folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return load_file(folder / "run" / "adapter.safetensors")


def same(job: Job, unbroken: dict[str, torch.Tensor]) -> bool:
    own = load_file(job.folder / "adapter.safetensors")
    return own.keys() == unbroken.keys() and all(own[k].equal(unbroken[k]) for k in own)


def test_a_job_at_its_time_limit_is_saved_and_requeued(
    ran: dict[str, Future[Any]], unbroken: dict[str, torch.Tensor]
) -> None:
    job = ran["time_limit"].result()
    (stopped,) = job.events("stopped")
    assert stopped["signal"] == "SIGUSR1" and stopped["saved"]
    assert [event["step"] for event in job.events("started")] == [0, stopped["step"]]
    assert "SIGUSR1: saved after step" in job.log.read_text()
    assert same(job, unbroken)


def test_a_job_whose_node_fails_goes_on_from_its_last_checkpoint(
    ran: dict[str, Future[Any]], unbroken: dict[str, torch.Tensor]
) -> None:
    job = ran["node_failure"].result()
    assert not job.events("stopped"), "it had no time to save itself"
    first, second = job.events("started")
    assert first["step"] == 0 and second["step"] >= 5 and second["step"] % 5 == 0
    assert same(job, unbroken)


def test_an_array_trains_a_sweep_and_a_cancelled_task_is_saved(
    ran: dict[str, Future[Any]],
) -> None:
    *done, cancelled = ran["sweep"].result()
    ends = [load_file(job.folder / "adapter.safetensors") for job in done]
    assert any(not ends[0][name].equal(ends[1][name]) for name in ends[0])
    assert not (cancelled.folder / "adapter.safetensors").exists()
    (stopped,) = cancelled.events("stopped")
    assert stopped["signal"] == "SIGTERM" and stopped["saved"]
    assert len(cancelled.events("started")) == 1, "it is not requeued"
