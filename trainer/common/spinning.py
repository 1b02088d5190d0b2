"""Threads that compute together spin while they wait for each other on a free machine, and sleep,
gathered on fewer processors, while other programs need them.

On a free machine spinning saves waking threads up, and a small model trains 1.7 times as fast.
Beside other programs it takes the time that the thread waited for would need, and a training step
can take 40 times as long. Neither sleeping (`crowd.py`) nor the place (`gathering.py`) changes how
work is divided, as another number of threads would: results stay the same to the last bit.

A thread of its own looks once a second at how long the threads of this process waited for a
processor. Where the user has said how threads wait, where there is one thread, and on systems
without `/proc`, nothing is done.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from trainer.common.crowd import Crowd
from trainer.common.gathering import Gathering
from trainer.common.system_load import Look, Looks, waits
from trainer.common.threads import USERS, allowed_processors, first_process

USERS_WAIT = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
EVERY = 1.0  # seconds between two looks
WAITED = 0.2  # of the time: a thread that waits longer for a processor shares it with another
TAKEN = 0.2  # processors that other programs may use on a machine that counts as free
PATIENCE = (4.0, 64.0)  # seconds a machine has to be free first; doubled where that was too soon
ANYWAY = 16  # times as long, and it is tried on one that is not: others may give way


class Decision:
    """Whether threads are to sleep, from one look to the next.

    spare: processors that this program leaves free when all its threads run.
    """

    def __init__(self, spare: int) -> None:
        self.spare, self.sleep = spare, False
        self.patience = PATIENCE[0]
        self.asleep, self.free, self.awake, self.crowded = 0.0, 0.0, math.inf, 0.0  # seconds

    def after(self, look: Look) -> bool:
        taken = look.taken is not None and look.taken > self.spare + TAKEN
        if self.sleep:
            self.free = 0.0 if taken else self.free + look.seconds
            self.asleep += look.seconds
            if self.free >= self.patience or self.asleep >= ANYWAY * self.patience:
                self.sleep, self.awake = False, 0.0
        else:
            self.awake += look.seconds
            # the threads of one program can wait for each other: it takes another to be in the way,
            # and for longer than the moment in which one ends and another begins
            waits_for_others = look.waited > WAITED and (taken or look.taken is None)
            self.crowded = self.crowded + look.seconds if waits_for_others else 0.0
            if self.crowded > 1.5 * EVERY:
                too_soon = self.awake <= self.patience
                self.patience = min(2 * self.patience, PATIENCE[1]) if too_soon else PATIENCE[0]
                self.sleep, self.asleep, self.free, self.crowded = True, 0.0, 0.0, 0.0
        return self.sleep


@contextmanager
def watched(
    environment: Mapping[str, str] = os.environ, say: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Inside the block threads spin or sleep as the machine asks for. say: hears, once, that other
    programs are in the way."""
    threads = _threads(environment)
    if threads == 1 or any(name in environment for name in USERS_WAIT) or waits() is None:
        yield
        return
    told = say or (_complain if first_process(environment) else lambda text: None)
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
    crowd, gathering, looks, told = Crowd(), Gathering(), Looks(), False
    while not ended.wait(EVERY):
        look = looks.next()
        computing = _computing() if decision.after(look) else 0
        if computing > 1 and crowd.call():
            gathering.gather(computing, look.busy, look.own)
            if not told:
                told = True
                say(
                    "other programs need the processors: threads that wait sleep from here on, and "
                    "spin again when the machine is free"
                )
        else:
            crowd.dismiss()
            gathering.scatter()
    crowd.dismiss()
    gathering.scatter()


def _computing() -> int:
    """Threads that torch computes with; 0 while it is not imported."""
    torch: Any = sys.modules.get("torch")
    found: list[int] = []
    if hasattr(torch, "get_num_threads"):
        # a new thread learns the number that was set last, and no other does. It asks before anyone
        # else counts the processors, where they have not been narrowed
        asking = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        asking.start()
        asking.join()
    return found[0] if found else 0


def _threads(environment: Mapping[str, str]) -> int:
    """That torch will take."""
    for name in USERS:
        if environment.get(name, "").isdigit():
            return max(1, int(environment[name]))
    return len(allowed_processors())


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
