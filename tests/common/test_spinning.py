"""Idle threads spin on a free machine and sleep on a busy one, and results stay the same."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from trainer.__main__ import main
from trainer.cli import check
from trainer.common import spinning, threads
from trainer.common.spinning import Decision, Look, watched
from trainer.common.threads import Machine


def look(waited: float, taken: float | None) -> Look:
    """A second in which other programs used so many processors of two, and this one half of one."""
    busy = {} if taken is None else {0: (taken + 0.5) / 2, 1: (taken + 0.5) / 2}
    return Look(1.0, waited, 0.5, busy)


BUSY, FREE = look(0.5, 1.5), look(0.01, 0.05)
needs_two = pytest.mark.skipif(
    not sys.platform.startswith("linux") or len(spinning.allowed_processors()) < 2,
    reason="two threads that wait for each other need two processors, and libgomp",
)


def after(decision: Decision, look: Look, seconds: int) -> list[bool]:
    return [decision.after(look) for _ in range(seconds)]


def asleep(decision: Decision, look: Look = BUSY) -> bool:
    """After two seconds beside other programs, which is when threads begin to sleep."""
    return after(decision, look, 2)[-1]


def test_threads_sleep_after_two_seconds_and_spin_again_after_some() -> None:
    decision = Decision(spare=0)
    assert after(decision, FREE, 3) == [False] * 3
    assert after(decision, BUSY, 2) == [False, True]
    assert after(decision, FREE, 4) == [True, True, True, False]


def test_a_second_beside_another_program_is_not_enough() -> None:
    decision = Decision(spare=0)
    for _ in range(5):
        assert not decision.after(BUSY)
        assert not decision.after(FREE)


def test_a_moment_of_quiet_is_not_enough() -> None:
    decision = Decision(spare=0)
    assert asleep(decision)
    for _ in range(5):
        assert after(decision, FREE, 3) == [True] * 3
        assert decision.after(BUSY)


def test_threads_of_one_program_that_wait_for_each_other_keep_spinning() -> None:
    """On a free machine two teams of threads on two processors wait a third of their time."""
    assert not any(after(Decision(0), look(0.34, 0.19), 60))
    assert not any(after(Decision(2), look(0.34, 2.19), 60))


def test_the_bounds() -> None:
    assert not asleep(Decision(0), look(0.2, 2.0))
    assert not asleep(Decision(0), look(0.21, 0.19))
    assert asleep(Decision(0), look(0.21, 0.21))
    assert asleep(Decision(0), look(0.21, None))
    decision = Decision(0)
    assert asleep(decision)
    assert after(decision, look(0.0, 0.21), 60)[-1]
    assert not after(decision, look(0.0, 0.19), 4)[-1]


def test_spinning_is_tried_in_the_end_on_a_machine_that_is_not_free() -> None:
    """Other programs may be of the kind that gives way."""
    decision = Decision(spare=0)
    assert asleep(decision)
    assert after(decision, BUSY, 64) == [True] * 63 + [False]
    assert after(decision, look(0.0, 0.5), 9) == [False] * 9
    assert asleep(decision)
    decision.awake = decision.patience  # too soon again
    assert after(decision, BUSY, 64) == [True] * 63 + [False]
    assert asleep(decision)
    assert after(decision, BUSY, 128) == [True] * 127 + [False]


def test_while_asleep_waiting_says_nothing_and_what_others_take_does() -> None:
    """A thread that is woken up often waits often, on a free machine, too."""
    decision = Decision(spare=0)
    assert asleep(decision)
    assert after(decision, look(0.5, 0.0), 4) == [True, True, True, False]


def test_processors_that_this_program_leaves_free_may_be_taken() -> None:
    decision = Decision(spare=3)
    assert asleep(decision, look(0.5, 4.0))
    assert after(decision, look(0.0, 3.1), 4) == [True, True, True, False]


def test_where_spinning_again_was_wrong_it_is_tried_more_seldom() -> None:
    """As under a quota, which other programs' use of the machine does not show."""
    decision, seconds = Decision(spare=0), []
    unknown = look(0.0, None)
    for _ in range(7):
        assert asleep(decision)
        seconds.append(1 + after(decision, unknown, 100).index(False))
        decision.sleep, decision.free, decision.awake = False, 0.0, 0.0  # what followed is undone
    assert seconds == [4, 8, 16, 32, 64, 64, 64]
    after(decision, FREE, 65)
    assert asleep(decision)
    assert after(decision, unknown, 4) == [True, True, True, False]


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_WAIT_POLICY": "ACTIVE"},
        {"GOMP_SPINCOUNT": "1000"},
        {"OMP_NUM_THREADS": "1"},
        {"MKL_NUM_THREADS": "1"},
    ],
)
def test_what_the_user_set_stands(environment: dict[str, str]) -> None:
    before = threading.active_count()
    with watched(environment):
        assert threading.active_count() == before


@needs_two
def test_the_watch_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spinning, "EVERY", 0.01)
    before = set(threading.enumerate())
    with watched({"OMP_NUM_THREADS": "2"}):
        (watch,) = set(threading.enumerate()) - before
    assert not watch.is_alive()


# What the other threads of this process burn, in ms of processor time, for each piece of work that
# the main thread gives them; then what a network with every usual kind of sum comes to.
PROGRAM = """
import hashlib, os, threading, time
import torch
from torch.nn import functional as F
from trainer.common import spinning, threads
torch.set_num_threads(2)
x = torch.zeros(1 << 18)
def used():
    own, total = threading.get_native_id(), 0
    for task in os.listdir("/proc/self/task"):
        if int(task) != own:
            total += int(open(f"/proc/self/task/{task}/schedstat").read().split()[0])
    return total / 1e6
def burnt():
    x.add_(1)
    before = used()
    for _ in range(20):
        x.add_(1)
        time.sleep(0.02)
    return (used() - before) / 20
def digest():
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(4, 32, 33, 33, generator=draw).requires_grad_()
    kernel = torch.randn(48, 32, 3, 3, generator=draw).requires_grad_()
    tokens = F.group_norm(F.conv2d(image, kernel), 4).flatten(2).transpose(1, 2)[:, None]
    o = F.scaled_dot_product_attention(tokens, tokens, tokens)
    loss = F.layer_norm(o @ o.transpose(-1, -2), (o.shape[-2],)).exp().sum()
    loss.backward()
    found = hashlib.sha256()
    for value in (loss, image.grad, kernel.grad):
        found.update(value.detach().numpy().tobytes())
    return found.hexdigest()
"""


def in_a_process(program: str, **environment: str) -> list[str]:
    """The words it prints."""
    kept = {k: v for k, v in os.environ.items() if k not in (*spinning.USERS, *spinning.USERS_WAIT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + program],
        env=kept | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@needs_two
def test_a_crowd_makes_the_others_sleep_and_changes_no_bit() -> None:
    words = in_a_process(
        "crowd, gathering = spinning.Crowd(), spinning.Gathering()\n"
        "for _ in range(2):\n"
        "    print(burnt(), digest())\n"
        "    assert crowd.call() and crowd.call()\n"
        "    print(burnt(), digest())\n"
        "    gathering.gather(2, {i: 0.0 for i in threads.allowed_processors()}, 0.0)\n"
        "    print(burnt(), digest())\n"
        "    gathering.scatter()\n"
        "    crowd.dismiss()\n"
        "    time.sleep(0.5)\n"
        "torch.set_num_threads(1)\n"
        "print(burnt(), digest())\n"
    )
    times, digests = [float(word) for word in words[::2]], words[1::2]
    assert min(times[0], times[3]) > 1.0, times
    assert max(*times[1:3], *times[4:6]) < 0.3, times
    assert len(set(digests[:6])) == 1
    assert digests[6] != digests[0]  # what another number of threads would have done


@pytest.fixture
def busy_loops() -> Iterator[None]:
    """As many as there are processors."""
    loop = [sys.executable, "-c", "while True: pass"]
    loops = [subprocess.Popen(loop) for _ in spinning.allowed_processors()]
    yield
    for each in loops:
        each.kill()
        each.wait()


@needs_two
@pytest.mark.usefixtures("busy_loops")
def test_beside_other_programs_idle_threads_sleep_and_one_line_says_so() -> None:
    words = in_a_process(
        "said, begin = [], time.monotonic()\n"
        "with spinning.watched({'OMP_NUM_THREADS': '2'}, said.append):\n"
        "    while not said and time.monotonic() - begin < 60:\n"
        "        x.add_(1)\n"
        "    time.sleep(0.1)\n"
        "    print(burnt(), len(os.sched_getaffinity(0)), len(threads.allowed_processors()))\n"
        "    torch.set_num_threads(1)\n"  # as each of two ranks has on two processors
        "    begin = time.monotonic()\n"
        "    while len(os.sched_getaffinity(0)) == 1 and time.monotonic() - begin < 60:\n"
        "        time.sleep(0.1)\n"
        "    print(len(os.sched_getaffinity(0)))\n"
        "print(len(os.sched_getaffinity(0)), len(said), 'need' in said[0])\n"
    )
    every = str(len(spinning.allowed_processors()))
    assert float(words[0]) < 0.3
    assert words[1:] == ["1", every, every, every, "1", "True"]


def test_without_libgomp_there_is_no_crowd() -> None:
    program = (
        "from trainer.common import spinning\n"
        "crowd = spinning.Crowd()\n"
        "assert spinning._computing() == 0\n"
        "assert not crowd.call()\n"
        "crowd.dismiss()\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_only_the_first_rank_speaks() -> None:
    assert threads.first_process({})
    assert threads.first_process({"RANK": "0", "LOCAL_RANK": "0"})
    assert not threads.first_process({"LOCAL_RANK": "1"})
    assert not threads.first_process({"SLURM_PROCID": "3"})


@needs_two
def test_every_verb_is_watched_and_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container of one core; what `check` sees when it begins."""
    seen: list[tuple[str | None, bool]] = []

    def run(words: list[str]) -> int:
        watching = any(thread.name == "spinning" for thread in threading.enumerate())
        seen.append((os.environ.get("OMP_NUM_THREADS"), watching))
        return 0

    monkeypatch.setattr(check, "run", run)
    for cores in (2, 1):
        monkeypatch.setattr(threads, "this_machine", lambda cores=cores: Machine(2, 2, 2, cores))
        for name in (*threads.USERS, *spinning.USERS_WAIT, threads.OWN):
            monkeypatch.setenv(name, "")  # so that what the program sets is undone
            monkeypatch.delenv(name)
        assert main(["check", "recipe=lora"]) == 0
    assert seen == [(None, True), ("1", False)]  # one thread waits for no other
