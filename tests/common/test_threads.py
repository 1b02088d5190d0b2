"""The number of threads: what the system, the container, the job and the user say of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.common import threads
from trainer.common.threads import Machine, limit_threads, quota, set_by_user, thread_count


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/job/own\n"}
V1 = {"proc/self/cgroup": "9:memory:/m\n4:cpu,cpuacct:/job\n0::/\n"}
FOLDER = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        (V2, None),
        (V2 | {f"{FOLDER}/job/own/cpu.max": "150000 100000\n"}, 1.5),
        (V2 | {f"{FOLDER}/job/own/cpu.max": "max 100000\n"}, None),
        # the group above allows less
        (
            V2
            | {
                f"{FOLDER}/job/own/cpu.max": "400000 100000",
                f"{FOLDER}/job/cpu.max": "100000 50000",
            },
            2.0,
        ),
        # inside a container, whose own group is mounted at the root
        (V2 | {f"{FOLDER}/cpu.max": "300000 100000"}, 3.0),
        (
            V1
            | {
                f"{FOLDER}/cpu,cpuacct/job/cpu.cfs_quota_us": "250000\n",
                f"{FOLDER}/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            V1
            | {
                f"{FOLDER}/cpu/cpu.cfs_quota_us": "50000",
                f"{FOLDER}/cpu/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        (
            V1
            | {
                f"{FOLDER}/cpu/job/cpu.cfs_quota_us": "-1",
                f"{FOLDER}/cpu/job/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        # of memory, not of processors
        (
            {"proc/self/cgroup": "9:memory:/m\n"}
            | {
                f"{FOLDER}/memory/m/cpu.cfs_quota_us": "50000",
                f"{FOLDER}/memory/m/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        (V2 | {f"{FOLDER}/job/own/cpu.max": "nonsense"}, None),
    ],
)
def test_the_quota_of_control_groups(
    files: dict[str, str], cores: float | None, tmp_path: Path
) -> None:
    assert quota(make(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("machine", "ranks", "environment", "count"),
    [
        (Machine(8, 8, 8), 1, {}, 8),
        (Machine(16, 8, 16), 1, {}, 8),  # two logical processors a core
        (Machine(8, 8, 8), 3, {}, 2),
        (Machine(2, 2, 64), 4, {}, 1),
        (Machine(64, 64, 64, 3.9), 1, {}, 3),
        (Machine(64, 64, 64, 0.5), 1, {}, 1),
        (Machine(64, 64, 64, 4.0), 2, {}, 2),
        (Machine(2, 2, 2, 8.0), 1, {}, 2),
        (Machine(64, 64, 64), 4, {"SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "8"}, 8),
        (Machine(4, 4, 64), 1, {"SLURM_CPUS_PER_TASK": "8"}, 4),
        (Machine(64, 64, 64, 2.0), 1, {"SLURM_CPUS_PER_TASK": "8"}, 2),
        # a task that Slurm has bound to its own processors, and one that shares the machine
        (Machine(8, 8, 64), 8, {"SLURM_PROCID": "3"}, 8),
        (Machine(64, 64, 64), 8, {"SLURM_PROCID": "3"}, 8),
    ],
)
def test_the_number_of_threads(
    machine: Machine, ranks: int, environment: dict[str, str], count: int
) -> None:
    assert thread_count(machine, environment, ranks) == count


def test_logical_processors_of_one_core_count_once(tmp_path: Path) -> None:
    pairs = {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}
    path = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    root = make(tmp_path, {path.format(i): f"{pair}\n" for i, pair in pairs.items()})
    assert threads._cores({0, 1, 2, 3}, root) == 2
    assert threads._cores({0, 2}, root) == 1
    assert threads._cores({0, 1, 7}, root) == 3  # of 7 nothing is known


def test_what_the_user_set_stands() -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment = {name: "7"}
        limit_threads(environment, Machine(8, 8, 8, 2.0))
        assert environment == {name: "7"}


def test_a_limit_is_set_only_where_there_is_one() -> None:
    environment: dict[str, str] = {}
    limit_threads(environment, Machine(8, 4, 8))
    assert environment == {}
    limit_threads(environment, Machine(8, 4, 8, 2.0))
    assert environment == {"OMP_NUM_THREADS": "2", threads.OWN: "2"}


def test_a_process_started_by_this_one_chooses_for_itself() -> None:
    environment = {"OMP_NUM_THREADS": "2", threads.OWN: "2"}
    assert not set_by_user(environment)
    limit_threads(environment, Machine(8, 8, 8, 3.0))
    assert environment["OMP_NUM_THREADS"] == "3"
    limit_threads(environment, Machine(8, 8, 8))
    assert environment == {}
    # what the user set between the two stands
    assert set_by_user({"OMP_NUM_THREADS": "4", threads.OWN: "2"})
    assert set_by_user({"MKL_NUM_THREADS": "4", "OMP_NUM_THREADS": "2", threads.OWN: "2"})


def test_torch_takes_the_number() -> None:
    program = (
        "import os\n"
        "from trainer.common.threads import Machine, limit_threads\n"
        "limit_threads(os.environ, Machine(8, 8, 8, 1.5))\n"
        "import torch\n"
        "print(torch.get_num_threads())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in threads.USERS}
    found = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert int(found) == 1


def test_nothing_that_reads_the_number_is_imported_before() -> None:
    """The command line imports this file first; torch and numpy read the environment once."""
    program = (
        "import sys, trainer.__main__\n"
        "loaded = {'torch', 'numpy'} & set(sys.modules)\n"
        "loaded |= {line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}\n"
        "sys.exit(str(loaded) if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
