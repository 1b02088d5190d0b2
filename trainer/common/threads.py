"""How many threads torch divides its work among, chosen before torch is imported.

torch takes one thread for each processor core. That is too many where a container or a job owns a
share of the cores, and where several ranks run on one machine. What the user has set stands. Other
programs on the machine do not change the number: results depend on it in their last bits, and two
runs of one seed should be the same run whatever else the machine does (`spinning.py` deals with
that).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

USERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# what this program itself put into OMP_NUM_THREADS, so that a rank or another process it starts
# does not take it for the user's choice
OWN = "TRAINER_OMP_NUM_THREADS"
# all processors this program may use, while its threads are gathered on some (`gathering.py`)
ALL = "TRAINER_PROCESSORS"
CPUS = "sys/devices/system/cpu"
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # of this process, as launchers give it


@dataclass(frozen=True)
class Machine:
    """allowed: logical processors this process may run on; cores: physical cores among them;
    online: logical processors of the whole machine; quota: cores that the container may use on
    average, or None."""

    allowed: int
    cores: int
    online: int
    quota: float | None = None


def this_machine(root: Path = Path("/")) -> Machine:
    """What the system says of itself; root: where `proc` and `sys` are."""
    online = os.cpu_count() or 1
    allowed = allowed_processors()
    return Machine(
        allowed=len(allowed), cores=_cores(allowed, root), online=online, quota=quota(root)
    )


def allowed_processors() -> set[int]:
    """The logical processors this process may run on, all of them where the system does not say."""
    if stored := os.environ.get(ALL):
        return {int(number) for number in stored.split(",")}
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def return_to_all() -> None:
    """In a process that was started while the threads of the one that started it were gathered, of
    which it knows by the environment: takes back the other processors."""
    if ALL in os.environ:
        everywhere = allowed_processors()
        del os.environ[ALL]
        with suppress(OSError):
            os.sched_setaffinity(0, everywhere)


def thread_count(machine: Machine, environment: Mapping[str, str], ranks: int = 1) -> int:
    """Threads of one of `ranks` ranks on this machine, at least 1.

    Slurm binds a task to processors of its own or says how many it has; ranks started in any other
    way share what this process may use.
    """
    cores = machine.cores if machine.quota is None else min(machine.cores, machine.quota)
    per_task = environment.get("SLURM_CPUS_PER_TASK", "")
    if per_task.isdigit():
        return max(1, int(min(cores, int(per_task))))
    bound = "SLURM_PROCID" in environment and machine.allowed < machine.online
    return max(1, int(cores / (1 if bound else ranks)))


def first_process(environment: Mapping[str, str]) -> bool:
    """Whether this is the first of the processes of a run, or the only one."""
    return all(environment.get(name, "0") == "0" for name in RANKS)


def set_by_user(environment: Mapping[str, str]) -> bool:
    """Whether the number of threads is the user's own choice."""
    own = environment.get(OWN)
    return any(environment.get(name, own) not in (None, own) for name in USERS)


def hand_down(count: int, environment: MutableMapping[str, str]) -> None:
    """Says the number to the libraries of this process and of those it starts, as our own."""
    environment["OMP_NUM_THREADS"] = environment[OWN] = str(count)


def limit_threads(
    environment: MutableMapping[str, str] = os.environ, machine: Machine | None = None
) -> None:
    """Sets `OMP_NUM_THREADS` where fewer threads than cores are to be used and the user has set
    nothing. To be called before torch or numpy is imported."""
    if set_by_user(environment):
        return
    for name in ("OMP_NUM_THREADS", OWN):  # of the process that started this one
        environment.pop(name, None)
    machine = machine or this_machine()
    count = thread_count(machine, environment)
    if count < machine.cores:
        hand_down(count, environment)


def quota(root: Path = Path("/")) -> float | None:
    """Cores that the control groups of this process may use on average: the smallest quota from its
    own group up to the root; None without one. Both versions of control groups are read."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found += _quotas(root / "sys/fs/cgroup", path)
        elif "cpu" in controllers.split(","):
            for name in {"cpu", controllers}:
                found += _quotas(root / "sys/fs/cgroup" / name, path)
    return min(found, default=None)


def _quotas(mount: Path, path: str) -> list[float]:
    """Of a group and all above it. Inside a container the path may be the host's: what is not there
    is passed over, and the mount itself is the container's group."""
    own = PurePosixPath(path.lstrip("/"))
    groups = [mount / group for group in (own, *own.parents)]
    return [each for group in dict.fromkeys(groups) if (each := _quota(group)) is not None]


def _quota(group: Path) -> float | None:
    """Of one group: `cpu.max` holds "quota period" in µs, or "max period"; version 1 has two files
    and a quota of -1 for none."""
    try:
        if (group / "cpu.max").is_file():
            limit, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            limit = (group / "cpu.cfs_quota_us").read_text(encoding="utf-8")
            period = (group / "cpu.cfs_period_us").read_text(encoding="utf-8")
        return int(limit) / int(period) if int(limit) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _cores(allowed: set[int], root: Path) -> int:
    """Physical cores among logical processors: those that share a core name the same siblings."""
    siblings = set()
    for number in allowed:
        path = root / CPUS / f"cpu{number}" / "topology/thread_siblings_list"
        try:
            siblings.add(path.read_text(encoding="utf-8").strip())
        except OSError:
            siblings.add(str(number))
    return max(1, len(siblings))
