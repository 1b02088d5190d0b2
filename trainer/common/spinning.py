"""Idle OpenMP threads sleep, instead of spinning, while other programs need the processors.

torch's builds for Linux bring libgomp. A thread of it that waits for the next piece of work spins
for 300,000 rounds, several ms, before it sleeps. On a free machine that saves waking it up, and a
small model trains 1.7 times as fast. Beside other programs it takes the time that the thread it
waits for would need, and a training step can take 40 times as long.

libgomp spins for 100 rounds only while it manages more threads than there are processors
(documented at GOMP_SPINCOUNT). So a crowd of threads that do nothing makes all others sleep soon,
and they spin again when it is gone. Unlike another number of threads, neither changes how work is
divided, so that results stay the same to the last bit.

A thread of its own looks once a second at how long the threads of this process waited for a
processor, and calls or dismisses the crowd. Where the user has said how threads wait, where there
is one thread, and on systems without `/proc`, nothing is done.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer.common.threads import USERS, allowed_processors

USERS_WAIT = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
EVERY = 1.0  # seconds between two looks
WAITED = 0.2  # of the time: a thread that waits longer for a processor shares it with another
TAKEN = 0.2  # processors that other programs may use on a machine that counts as free
PATIENCE = (4.0, 64.0)  # seconds a machine has to be free first; doubled where that was too soon
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
BUSY = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal of a line of /proc/stat


@dataclass(frozen=True)
class Look:
    """What was seen since the look before. waited: the share of the time that the thread which
    waited longest for a processor did so; taken: processors that other programs used, None where
    the system does not say."""

    seconds: float
    waited: float
    taken: float | None


class Decision:
    """Whether idle threads are to sleep, from one look to the next.

    spare: processors that this program leaves free when all its threads run.
    """

    def __init__(self, spare: int) -> None:
        self.spare, self.sleep = spare, False
        self.patience = PATIENCE[0]
        self.free, self.awake = 0.0, math.inf  # seconds

    def after(self, look: Look) -> bool:
        if self.sleep:
            taken = look.taken is not None and look.taken > self.spare + TAKEN
            self.free = 0.0 if taken else self.free + look.seconds
            if self.free >= self.patience:
                self.sleep, self.awake = False, 0.0
        else:
            self.awake += look.seconds
            if look.waited > WAITED:
                too_soon = self.awake <= self.patience
                self.patience = min(2 * self.patience, PATIENCE[1]) if too_soon else PATIENCE[0]
                self.sleep, self.free = True, 0.0
        return self.sleep


class Crowd:
    """Threads that do nothing, managed by the libgomp that is loaded, if one is."""

    def __init__(self) -> None:
        self._gone: threading.Event | None = None

    def call(self) -> bool:
        """Whether it is there."""
        if self._gone is None and (library := loaded_libgomp()) is not None:
            come, self._gone = threading.Event(), threading.Event()
            threading.Thread(target=_stand, args=(library, come, self._gone), daemon=True).start()
            come.wait()
        return self._gone is not None

    def dismiss(self) -> None:
        if self._gone is not None:
            self._gone.set()  # libgomp ends the threads of a team with the one that began it
            self._gone = None


def _stand(library: ctypes.CDLL, come: threading.Event, gone: threading.Event) -> None:
    # any function does for the team that takes a pointer and keeps nothing
    nothing = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p)
    library.GOMP_parallel(nothing, None, len(allowed_processors()) + 1, 0)
    come.set()
    gone.wait()


def loaded_libgomp() -> ctypes.CDLL | None:
    """The one this process has loaded already; with several, torch's."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line}
    chosen = sorted(paths, key=lambda path: "/torch/" not in path)
    return ctypes.CDLL(chosen[0]) if chosen else None


@contextmanager
def watched(
    environment: Mapping[str, str] = os.environ, say: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Inside the block idle threads spin or sleep as the machine asks for. say: hears, once, that
    other programs are in the way."""
    threads = _threads(environment)
    if threads == 1 or any(name in environment for name in USERS_WAIT) or _waits() is None:
        yield
        return
    told = say or (_complain if _first(environment) else lambda text: None)
    ended = threading.Event()
    decision = Decision(max(0, len(allowed_processors()) - threads))
    watch = threading.Thread(
        target=_watch, args=(decision, told, ended), name="spinning", daemon=True
    )
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join(EVERY)


def _watch(decision: Decision, say: Callable[[str], None], ended: threading.Event) -> None:
    crowd, told = Crowd(), False
    looks = Looks()
    while not ended.wait(EVERY):
        if not decision.after(looks.next()):
            crowd.dismiss()
        elif crowd.call() and not told:
            told = True
            say(
                "other programs need the processors: idle threads sleep from here on, and spin "
                "again when the machine is free"
            )
    crowd.dismiss()


class Looks:
    """Counters of the system at the last look."""

    def __init__(self) -> None:
        self._when, self._waits, self._others = time.monotonic(), _waits() or {}, _others()

    def next(self) -> Look:
        when, waits, others = time.monotonic(), _waits() or {}, _others()
        seconds = when - self._when
        longest = max((waits[i] - self._waits[i] for i in waits if i in self._waits), default=0.0)
        before, taken = self._others, None
        if others is not None and before is not None:
            taken = (others - before) / seconds
        self._when, self._waits, self._others = when, waits, others
        return Look(seconds, longest / seconds, taken)


def _waits() -> dict[str, float] | None:
    """Seconds that each thread of this process has been ready to run without a processor; None
    where the system does not say."""
    found = {}
    try:
        for task in os.scandir("/proc/self/task"):
            try:
                text = Path(task.path, "schedstat").read_text(encoding="utf-8")
            except (ProcessLookupError, FileNotFoundError):  # a thread that has just ended
                continue
            found[task.name] = int(text.split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
    return found or None


def _others() -> float | None:
    """Seconds that other programs have used of the processors this process may run on."""
    try:
        lines = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None
    allowed = {f"cpu{number}" for number in allowed_processors()}
    rows = [line.split() for line in lines]
    times = [[int(each) for each in row[1:9]] for row in rows if row and row[0] in allowed]
    busy = sum(row[i] for row in times for i in BUSY if i < len(row)) / ticks
    return busy - time.process_time()


def _threads(environment: Mapping[str, str]) -> int:
    """That torch will take."""
    for name in USERS:
        if environment.get(name, "").isdigit():
            return max(1, int(environment[name]))
    return len(allowed_processors())


def _first(environment: Mapping[str, str]) -> bool:
    return all(environment.get(name, "0") == "0" for name in RANKS)


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
