"""Runs with a fault in them: processes forked where everything is imported, or started anew where a
run starts others itself; what they said, how they ended, how long that took."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
AT_ONCE = 2  # processes
LIMIT = 120.0  # seconds after which a run counts as hung, where a part says nothing else


def load(path: Path) -> Any:
    """A file of the tests as a module."""
    spec = importlib.util.spec_from_file_location(f"bench_{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Ended:
    """code: the exit code, minus the signal's number of one that was killed, None for a run that
    had to be ended; seconds: how long it was waited for; said: both streams."""

    code: int | None
    seconds: float
    said: str

    def text(self) -> str:
        if self.code is None:
            return f"hangs (ended from outside after {self.seconds:.0f} s)"
        return f"exit code {self.code}" if self.code >= 0 else f"killed by signal {-self.code}"

    def error(self) -> str:
        """The last line of what it said that names an error."""
        lines = [line.strip() for line in self.said.splitlines()]
        named = [line for line in lines if "Error" in line.split(":")[0] or "error:" in line]
        return named[-1][:160] if named else ""


class Job:
    """A process, which leads a group of its own."""

    def __init__(self, pid: int, poll: Callable[[], int | None], log: Path) -> None:
        self.pid, self.poll, self.log = pid, poll, log

    def wait(self, limit: float = LIMIT) -> Ended:
        began = time.monotonic()
        while (code := self.poll()) is None and time.monotonic() - began < limit:
            time.sleep(0.005)
        seconds = time.monotonic() - began
        self.end()
        return Ended(code, seconds, self.log.read_text(encoding="utf-8", errors="replace"))

    def wait_for(self, there: Callable[[], bool], limit: float = LIMIT) -> bool:
        """Until something is on the disk; False if the process ends before, or in too long."""
        began = time.monotonic()
        while not there():
            if self.poll() is not None or time.monotonic() - began > limit:
                return there()
            time.sleep(0.001)
        return True

    def kill(self) -> Ended:
        """kill -9, as the machine's end would be."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def end(self) -> None:
        """What is left of the group, data workers and other ranks, is removed."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _enter(log: str, environment: Mapping[str, str], target: Any, arguments: Sequence[Any]) -> None:
    os.setsid()
    stream = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(stream, number)
    os.environ.update(environment)
    tempfile.tempdir = None  # TMPDIR is read again
    target(*arguments)


class Place:
    """A scratch folder with what all parts share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["trainer.training.fit", "trainer.cli.data", "webdataset"]
        )
        for name in ("TRAINER_RUN_ID", "WANDB_API_KEY"):
            os.environ.pop(name, None)
        self.faults, shared = load(TESTS / "faults" / "conftest.py"), load(TESTS / "conftest.py")
        self.cache = shared.CACHE
        self.backbone = shared.make_folder(self.folder / "tiny")
        self.jobs: list[Job] = []
        self._one = threading.Lock()  # to start a process is to ask how all others do
        self._number = 0

    def close(self) -> None:
        """Ends what still runs, where a part has failed."""
        for job in self.jobs:
            if job.poll() is None:
                job.end()
        shutil.rmtree(self.cache, ignore_errors=True)

    def new(self, name: str) -> Path:
        """A folder nobody has used."""
        self._number += 1
        path = self.folder / f"{name}-{self._number}"
        path.mkdir(parents=True)
        return path

    def _log(self) -> Path:
        self._number += 1
        return self.folder / f"said-{self._number}.txt"

    def fork(
        self, target: Any, *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> Job:
        log = self._log()
        process: Any = self.context.Process(
            target=_enter, args=(str(log), dict(environment or {}), target, arguments)
        )

        def poll() -> int | None:
            with self._one:
                code: int | None = process.exitcode
                return code

        log.touch()
        with self._one:
            process.start()
        return self._kept(Job(process.pid, poll, log))

    def start(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Job:
        log = self._log()
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=stream,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        return self._kept(Job(process.pid, process.poll, log))

    def _kept(self, job: Job) -> Job:
        self.jobs.append(job)
        return job

    def words(self, folder: Path, *own: str) -> list[str]:
        return [*self.faults.words_of(self.backbone, *own), f"run={folder}"]

    def ours(self, folder: Path, faults: Mapping[str, Any], *own: str, **options: Any) -> Job:
        """This trainer's `fit`, with a fault of tests/faults/driver.py."""
        run = self.faults.driver.run
        return self.fork(run, dict(faults), self.words(folder, *own), **options)

    def ours_ranks(self, folder: Path, faults: Mapping[str, Any], ranks: int, *own: str) -> Job:
        driver = str(TESTS / "faults" / "driver.py")
        ranked = (f"run.devices={ranks}", "run.accelerator=cpu")
        command = [sys.executable, driver, json.dumps(dict(faults))]
        return self.start([*command, *self.words(folder, *ranked, *own)])

    def plain(self, *words: str, **options: Any) -> Job:
        """The ordinary Lightning script."""
        import _plain_lightning

        return self.fork(_plain_lightning.main, list(words), **options)

    def plain_ranks(self, ranks: int, *words: str) -> Job:
        script = str(HERE / "_plain_lightning.py")
        return self.start([sys.executable, script, f"--devices={ranks}", *words])

    def loop(self, *words: str) -> Job:
        """The accelerate loop."""
        import _accelerate_loop

        return self.fork(_accelerate_loop.main, list(words))


def in_turn(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Their results, `AT_ONCE` at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def seen(folder: Path) -> dict[int, list[str]]:
    """What a script has trained on: keys by optimiser step, ranks one after another; the last word
    on a step that was done twice."""
    found: dict[int, list[str]] = {}
    for path in sorted(folder.glob("seen-*.jsonl")):
        own: dict[int, list[str]] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            own[row["step"]] = row["keys"]
        for step, keys in own.items():
            found.setdefault(step, []).extend(keys)
    return found


def equal(one: Any, other: Any) -> bool:
    """Two trees of tensors, to the last bit."""
    import torch

    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[bool]:
    """A file system of its own at an empty folder; False where none may be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True).returncode == 0
    with ExitStack() as stack:
        if mounted:
            stack.callback(subprocess.run, ["umount", str(place)], check=True)
        yield mounted
