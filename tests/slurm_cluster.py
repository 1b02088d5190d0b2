"""A real Slurm on this machine: munged, one slurmctld, and four slurmd on four ports, in two
partitions of two nodes each.

    with running_cluster(folder) as cluster:
        cluster.ask("sbatch", "job.sh")

It needs Debian's packages slurm-wlm and munge, and root. Everything it writes is in `folder`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PARTITIONS = {"first": ("n1", "n2"), "second": ("n3", "n4")}
NODES = tuple(node for nodes in PARTITIONS.values() for node in nodes)
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
CONFIGURATION = """
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits as long as a credential lives, 120 s by default
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=DisableIPv6
SwitchType=switch/none
MpiDefault=none
TaskPlugin=task/none
ProctrackType=proctrack/linuxproc
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=3
SlurmdTimeout=10
# nodes of four processors, whatever this machine has
SlurmdParameters=config_overrides
KillWait=10
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldDebug=debug
{nodes}
{partitions}
"""


def missing_for_slurm() -> str | None:
    """Why no cluster can be started here, or None."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root, for Slurm's daemons"
    path = _path()
    lacking = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"needs slurm-wlm and munge, which have {', '.join(lacking)}" if lacking else None


@dataclass
class Cluster:
    """environment: of Slurm's commands; nodes: the running slurmd of each."""

    folder: Path
    environment: dict[str, str]
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def ask(
        self, *words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """What a command of Slurm's prints."""
        ended = subprocess.run(
            words,
            env={**self.environment, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == 0, f"{words}: {ended.stderr}"
        return ended.stdout

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, by its names."""
        shown = self.ask("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, happened: Callable[[], object], seconds: float = 60) -> None:
        """Until something has happened, at most that long."""
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.1)

    def start_node(self, name: str) -> None:
        words = ["slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf")]
        self.nodes[name] = _daemon(words, self)

    def kill_node(self, name: str) -> None:
        """Kills the daemon of a node; what it has started is left alone."""
        self.nodes[name].kill()
        self.nodes.pop(name).wait()

    def kill_left(self, job: str, node: str) -> None:
        """Kills what a daemon that was killed has left of a job."""
        for pid in self.processes(job, node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, job: str, node: str) -> list[int]:
        """The processes of a job's ranks on a node."""
        settings = (f"SLURM_JOB_ID={job}", f"SLURMD_NODENAME={node}", "SLURM_PROCID=")
        return sorted(set.intersection(*(set(_whose(each)) for each in settings)))

    def logs(self) -> str:
        """The ends of the daemons' logs, for a test that failed."""
        found = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in found)


@contextlib.contextmanager
def running_cluster(folder: Path, python: Path | None = None) -> Iterator[Cluster]:
    """A cluster whose nodes are idle; its daemons and all that they started end with it. python: a
    program that jobs start by that name, if not the usual one."""
    configuration = folder / "slurm.conf"
    configuration.write_text(_configuration(folder), encoding="utf-8")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("SLURM")},
        "PATH": os.pathsep.join([*([str(python.parent)] if python else []), _path()]),
        "SLURM_CONF": str(configuration),
        "MASTER_ADDR": "127.0.0.1",  # the nodes have no names that the network knows
    }
    cluster = Cluster(folder, environment)
    (folder / "state").mkdir()
    daemons = [_munge(cluster)]
    try:
        daemons.append(_daemon(["slurmctld", "-D", "-f", str(configuration)], cluster))
        for name in NODES:
            (folder / f"spool-{name}").mkdir()
            cluster.start_node(name)
        cluster.wait(lambda: _idle(cluster))
        yield cluster
    finally:
        _end(cluster, daemons)


def _end(cluster: Cluster, daemons: Sequence[subprocess.Popen[bytes]]) -> None:
    for daemon in [*cluster.nodes.values(), *reversed(daemons)]:
        daemon.terminate()
    for pid in _whose(f"SLURM_CONF={cluster.folder / 'slurm.conf'}"):
        if pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for daemon in [*cluster.nodes.values(), *daemons]:
        try:
            daemon.wait(5)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _idle(cluster: Cluster) -> bool:
    ended = subprocess.run(
        ["sinfo", "-h", "-N", "-o", "%T"],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return ended.stdout.split() == ["idle"] * len(NODES)


def _munge(cluster: Cluster) -> subprocess.Popen[bytes]:
    key = cluster.folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    names = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    files = [f"--{option}={cluster.folder}/munge.{end}" for option, end in names.items()]
    # --force: a temporary folder is open to more users than munge likes
    process = _daemon(["munged", "--foreground", "--force", f"--key-file={key}", *files], cluster)
    cluster.wait((cluster.folder / "munge.socket").exists)
    return process


def _daemon(words: Sequence[str], cluster: Cluster) -> subprocess.Popen[bytes]:
    with (cluster.folder / f"{words[0]}-printed.log").open("ab") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, env=cluster.environment)


def _configuration(folder: Path) -> str:
    host, ports = platform.node(), _free_ports(len(NODES) + 1)
    nodes = [
        f"NodeName={name} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} CPUs=4 State=UNKNOWN"
        for name, port in zip(NODES, ports, strict=False)
    ]
    partitions = [
        f"PartitionName={name} Nodes={','.join(own)} MaxTime=INFINITE State=UP"
        for name, own in PARTITIONS.items()
    ]
    return CONFIGURATION.format(
        host=host,
        controller=ports[-1],
        folder=folder,
        nodes="\n".join(nodes),
        partitions="\n".join(partitions),
    )


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in found]


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _whose(setting: str) -> list[int]:
    """The processes with a variable in the environment that they were started with."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if any(each.startswith(setting.encode()) for each in path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
    return found
