"""Moves all threads of this process onto half as many processors as it has compute threads.

Threads that share a piece of work wait for the slowest at its end. Beside other programs each of
them is held up on its own processor, at another moment than the others. On one processor two of
them take turns, which takes about as long as one thread that does both parts. The work is divided
as before, so results are the same to the last bit.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Mapping
from contextlib import suppress

from trainer.common.threads import ALL, allowed_processors

_OWN = random.Random()  # the run's own random numbers stay as they are
CLEARLY = 0.3  # of a processor: move only where others use the new ones less by this much each


class Gathering:
    """The processors that the threads of this process are gathered on; none at first."""

    def __init__(self) -> None:
        self.chosen: frozenset[int] = frozenset()

    def gather(self, threads: int, busy: Mapping[int, float], own: float) -> None:
        """threads: that compute together; busy: of each processor, the share of the time it worked
        lately; own: processors that this process used then."""
        if not busy:
            return
        everywhere = allowed_processors()
        os.environ[ALL] = ",".join(map(str, sorted(everywhere)))
        here = least_used(busy, own, self.chosen, count=(threads + 1) // 2)
        # two programs that see the same are not to move to and fro together
        if not self.chosen or (here != self.chosen and _OWN.random() < 0.5):
            self.chosen = here
        bind(self.chosen)

    def scatter(self) -> None:
        if self.chosen:
            bind(frozenset(allowed_processors()))
            del os.environ[ALL]
            self.chosen = frozenset()


def least_used(
    busy: Mapping[int, float], own: float, chosen: frozenset[int], count: int
) -> frozenset[int]:
    """The `count` processors that other programs use least; those chosen, where others are not
    clearly better."""
    others = {i: busy[i] - (own / len(chosen) if i in chosen else 0.0) for i in busy}
    best = frozenset(sorted(others, key=lambda i: (round(others[i], 1), _OWN.random()))[:count])
    if len(chosen) != len(best):
        return best
    gain = sum(others.get(i, 0.0) for i in chosen) - sum(others[i] for i in best)
    return best if gain > CLEARLY * len(best) else chosen


def bind(processors: frozenset[int]) -> None:
    """Every thread of this process but the calling one."""
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError):  # it has just ended
            if (
                int(task) != threading.get_native_id()
                and os.sched_getaffinity(int(task)) != processors
            ):
                os.sched_setaffinity(int(task), processors)
