"""What Linux says of how busy the processors are: read from `/proc` once in a while."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from trainer.common.threads import allowed_processors

BUSY = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal of a line of /proc/stat


@dataclass(frozen=True)
class Look:
    """What was seen since the look before. seconds: how long that was; waited: the share of it that
    the thread which waited longest for a processor did so; own: processors that this process used;
    busy: by processor, the share of the time it worked, empty where the system does not say."""

    seconds: float
    waited: float
    own: float = 0.0
    busy: dict[int, float] = field(default_factory=dict)

    @property
    def taken(self) -> float | None:
        """Processors that other programs used."""
        return sum(self.busy.values()) - self.own if self.busy else None


class Looks:
    """The counters at the last look."""

    def __init__(self) -> None:
        self._before = (time.monotonic(), time.process_time(), waits() or {}, busy_seconds())

    def next(self) -> Look:
        now = (time.monotonic(), time.process_time(), waits() or {}, busy_seconds())
        (then, own_then, waits_then, busy_then), self._before = self._before, now
        when, own, waits_now, busy_now = now
        seconds = when - then
        longest = max(
            (waits_now[i] - waits_then[i] for i in waits_now.keys() & waits_then.keys()),
            default=0.0,
        )
        busy = {
            i: (busy_now[i] - busy_then[i]) / seconds for i in busy_now.keys() & busy_then.keys()
        }
        return Look(seconds, waited=longest / seconds, own=(own - own_then) / seconds, busy=busy)


def waits() -> dict[int, float] | None:
    """Seconds that each thread of this process has been ready to run without a processor; None
    where the system does not say."""
    found = {}
    try:
        for task in os.scandir("/proc/self/task"):
            try:
                text = Path(task.path, "schedstat").read_text(encoding="utf-8")
            except (ProcessLookupError, FileNotFoundError):  # a thread that has just ended
                continue
            found[int(task.name)] = int(text.split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
    return found or None


def busy_seconds() -> dict[int, float]:
    """Seconds that each processor this process may run on has worked, for any program; empty where
    the system does not say."""
    try:
        lines = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return {}
    names = {f"cpu{number}": number for number in allowed_processors()}
    rows = [line.split() for line in lines]
    return {
        names[row[0]]: sum(int(row[1 + i]) for i in BUSY) / ticks
        for row in rows
        if row and row[0] in names
    }
