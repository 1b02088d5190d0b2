"""Where the threads of a process are gathered."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest

from trainer.common.gathering import least_used

NONE: frozenset[int] = frozenset()
needs_two = pytest.mark.skipif(
    not sys.platform.startswith("linux") or len(os.sched_getaffinity(0)) < 2,
    reason="fewer processors than all",
)


def test_the_runs_own_random_numbers_stay_as_they_are() -> None:
    """They are part of what a resumed run must have again."""
    before = random.getstate()
    least_used({0: 1.0, 1: 1.0}, 0.0, NONE, 1)
    assert random.getstate() == before


def test_the_processors_that_others_use_least() -> None:
    assert least_used({0: 1.0, 1: 0.2, 2: 0.9, 3: 0.1}, 0.0, NONE, 2) == {1, 3}
    assert least_used({0: 1.0, 1: 0.2, 2: 0.9, 3: 0.1}, 0.0, NONE, 1) == {3}


def test_among_equals_chance_decides_so_that_two_programs_part() -> None:
    found = {least_used({0: 1.0, 1: 1.0}, 0.0, NONE, 1) for _ in range(64)}
    assert found == {frozenset({0}), frozenset({1})}


def test_ones_own_use_does_not_drive_away() -> None:
    assert least_used({0: 1.0, 1: 0.2}, 1.0, frozenset({0}), 1) == {0}
    assert least_used({0: 1.0, 1: 0.2}, 0.4, frozenset({0}), 1) == {1}


def test_a_small_gain_is_no_reason_to_move() -> None:
    assert least_used({0: 0.5, 1: 0.22}, 0.0, frozenset({0}), 1) == {0}
    assert least_used({0: 0.5, 1: 0.18}, 0.0, frozenset({0}), 1) == {1}


PROGRAM = """
import os, subprocess, sys, threading
from trainer.common.gathering import Gathering
from trainer.common.threads import allowed_processors, this_machine
everywhere, machine = os.sched_getaffinity(0), this_machine()
busy = dict.fromkeys(everywhere, 1.0)
gone = threading.Event()
threads = [threading.Thread(target=gone.wait) for _ in range(3)]
for thread in threads:
    thread.start()
def places():
    return {frozenset(os.sched_getaffinity(thread.native_id)) for thread in threads}
def main(gathering):
    gathering.gather(2, busy, 0.0)
    assert places() == {gathering.chosen} and len(gathering.chosen) == 1
    gathering.gather(2, {}, 0.0)  # a system that does not say
    assert os.sched_getaffinity(threading.main_thread().native_id) == gathering.chosen
    assert os.sched_getaffinity(0) == everywhere  # its own thread
    assert allowed_processors() == everywhere and this_machine() == machine
def children():
    child = "import os; print(len(os.sched_getaffinity(0)))"
    own = "from trainer.common.threads import ALL, return_to_all; return_to_all(); "
    own += "assert ALL not in __import__('os').environ; "
    for program in (child, own + child):
        print(subprocess.check_output([sys.executable, "-c", program], text=True))
gathering = Gathering()
watch = threading.Thread(target=main, args=(gathering,))
watch.start()
watch.join()
children()
watch = threading.Thread(target=gathering.scatter)
watch.start()
watch.join()
assert places() == {frozenset(everywhere)} and os.sched_getaffinity(0) == everywhere
children()
gone.set()
"""


@needs_two
def test_every_thread_is_gathered_and_scattered_and_own_children_run_everywhere() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    every = str(len(os.sched_getaffinity(0)))
    assert done.stdout.split() == ["1", every, every, every]
