"""The runs of a sweep as processes of this machine, several at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from trainer.common.exit_codes import CODES

PAUSE = 0.2  # seconds between looks at what has ended


@dataclass(frozen=True)
class Process:
    """A command of this program. words: the verb and what follows; log: the file that takes what it
    prints, after what is there; one_gpu: whether it may be given any one GPU."""

    name: str
    words: tuple[str, ...]
    log: Path
    one_gpu: bool


@dataclass
class _Running:
    """What is running, and the signals that arrived meanwhile. gpus: of the machine; held: which of
    them each process has."""

    gpus: Sequence[str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    received: int = 0

    def pass_on(self, number: int, _: FrameType | None) -> None:
        """Every run saves itself and ends; a second Ctrl-C ends it at once."""
        self.received = CODES[signal.Signals(number)]
        if os.name == "nt":  # they share the console, and hear of Ctrl-C themselves
            return
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(number)


def train_each(processes: Sequence[Process], at_once: int, gpus: Sequence[str]) -> dict[str, int]:
    """Starts each process when there is room for it, and returns the exit codes of all that were
    started, by name. SIGINT, SIGTERM and SIGUSR1 are passed on, and start no further one.

    gpus: of this machine; a process with `one_gpu` gets the one that the fewest others have.
    """
    running, codes = _Running(gpus), {}
    waiting = list(processes)
    with _signals(running):
        while waiting or running.processes:
            while waiting and len(running.processes) < at_once and not running.received:
                _start(waiting.pop(0), running)
            if running.received and not running.processes:
                break
            for name, process in list(running.processes.items()):
                if (code := process.poll()) is not None:
                    codes[name] = _ended(name, code, running)
            time.sleep(PAUSE)
    if running.received and waiting:
        codes |= {each.name: running.received for each in waiting}
    return codes


def gpus_here() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [each for each in visible.split(",") if each]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


@contextmanager
def _signals(running: _Running) -> Iterator[None]:
    before = {number: signal.signal(number, running.pass_on) for number in CODES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(process: Process, running: _Running) -> None:
    environment = dict(os.environ)
    if process.one_gpu and running.gpus:
        taken = list(running.held.values())
        running.held[process.name] = min(running.gpus, key=taken.count)
        environment["CUDA_VISIBLE_DEVICES"] = running.held[process.name]
    with process.log.open("ab") as log:
        # a session of its own: else the terminal sends it Ctrl-C too, and twice means at once
        running.processes[process.name] = subprocess.Popen(
            [sys.executable, "-m", "trainer", *process.words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=os.name != "nt",
        )
    print(f"{process.name}: started, its output is in {process.log}", flush=True)


def _ended(name: str, code: int, running: _Running) -> int:
    """Says how a process ended, and returns its exit code."""
    del running.processes[name]
    running.held.pop(name, None)
    code = code if code >= 0 else 128 - code  # killed by a signal, as a shell counts it
    print(f"{name}: " + ("finished" if code == 0 else f"ended with {code}"), flush=True)
    return code
