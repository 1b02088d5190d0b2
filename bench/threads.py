"""What the command's choice of threads is worth on a free machine and beside other programs.

    python bench/threads.py
    python bench/threads.py --quick

Processes that train LoRA on the tiny backbone take turns (A B A B), a few seconds each:

- idle: as the command has its threads, against an ordinary script's, whose idle threads spin;
- beside busy loops, one for each processor: the command against one thread;
- beside two ordinary scripts that train the same: the command against one thread.

The command notices within seconds that other programs have come, or gone; each part begins with
that long a turn, which is not counted but noted. A pair of turns during which further programs used
more than a tenth of a processor is taken again, a limited number of times. A bar is the median over
pairs of the ratio of images a second. All processes belong to one session, so that the scheduler
shares the processors among their threads. The full run also notes what an ordinary script does
beside the same load, and writes results/threads.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

from _common import Bars, parser_of

from trainer.common.spinning import USERS_WAIT
from trainer.common.system_load import busy_seconds
from trainer.common.threads import OWN, USERS, allowed_processors

HERE = Path(__file__).parent
# it ends with the script that has started it, however that ends
LOOP = [
    sys.executable, "-c",
    "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10**6))",
]  # fmt: skip
DISTURBED = 0.1  # processors that further programs use
TRIES = 3  # times as many pairs as are needed, at most
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Lengths:
    """warm, turn: seconds; pairs: how many."""

    warm: float
    turn: float
    pairs: int


class Trained:
    """A process that trains when it is told to."""

    def __init__(self, how: str, cache: Path, **environment: str) -> None:
        unset = (*USERS, *USERS_WAIT, OWN)
        kept = {name: value for name, value in os.environ.items() if name not in unset}
        kept["PYTHONPATH"] = str(HERE.parent)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "_stepping.py"), how],
            env={**kept, "TRAINER_CACHE": str(cache), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> None:
        if self._line() != "ready":
            raise SystemExit("a process that should train says something else")

    def _line(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"a process that should train ended with {self.process.wait()}")
        return line.strip()

    def begin(self, seconds: float) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()

    def turn(self, seconds: float) -> float:
        """Images a second."""
        self.begin(seconds)
        found = json.loads(self._line())
        return float(found["images"] / found["seconds"])


def used_by(processes: Sequence[subprocess.Popen[str]]) -> float:
    """Processor seconds since each began."""
    rows = [Path(f"/proc/{each.pid}/stat").read_text().rpartition(")")[2] for each in processes]
    return sum(int(time) for row in rows for time in row.split()[11:13]) / TICKS


def all_used() -> float:
    """Processor seconds of every program, on the processors this one may run on."""
    return sum(busy_seconds().values())


class Machine:
    """What further programs use of it. own: the processes that belong to the measurement."""

    def __init__(self) -> None:
        self.own: list[subprocess.Popen[str]] = []

    @contextmanager
    def further(self, found: list[float]) -> Iterator[None]:
        """Appends the processors they used inside the block."""
        begin, every, own = time.monotonic(), all_used(), used_by(self.own)
        yield
        further = all_used() - every - (used_by(self.own) - own)
        found.append(max(0.0, further / (time.monotonic() - begin)))


def compare(
    machine: Machine, one: Trained, other: Trained, lengths: Lengths
) -> dict[str, dict[str, float]]:
    """Images a second of each and the ratio of the first to the second, over pairs of turns:
    median and quartiles; the first's before it had adapted itself; what disturbed it."""
    first_seconds = one.turn(min(3.0, lengths.warm))
    one.turn(lengths.warm)
    calm: list[tuple[float, float]] = []
    disturbed: list[tuple[float, float, float]] = []
    further: list[float] = []
    while len(calm) < lengths.pairs and len(further) < TRIES * lengths.pairs:
        with machine.further(further):
            pair = one.turn(lengths.turn), other.turn(lengths.turn)
        if further[-1] <= DISTURBED:
            calm.append(pair)
        else:
            disturbed.append((further[-1], *pair))
    missing = max(0, lengths.pairs - len(calm))
    pairs = calm + [pair for _, *pair in sorted(disturbed)[:missing]]  # the least disturbed
    return {
        "first": spread([own for own, _ in pairs]),
        "second": spread([own for _, own in pairs]),
        "ratio": spread([own / against for own, against in pairs]),
        "first_seconds": {"images_per_second": first_seconds},
        "disturbed": {
            "pairs": len(pairs),
            "of_them_disturbed": missing,
            "processors_used_by_others": median(further),
        },
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    low, _, high = quantiles(values, n=4)
    return {"median": median(values), "low": low, "high": high}


@contextmanager
def busy_loops(machine: Machine) -> Iterator[None]:
    loops = [subprocess.Popen(LOOP, text=True) for _ in range(max(2, len(allowed_processors())))]
    machine.own += loops
    try:
        yield
    finally:
        for loop in loops:
            machine.own.remove(loop)
            loop.kill()
            loop.wait()


def say(name: str, found: Mapping[str, Mapping[str, float]], words: tuple[str, str]) -> None:
    shown = [f"{found[key]['median']:.1f}" for key in ("first", "second")]
    print(
        f"{name}: {words[0]} {shown[0]}, {words[1]} {shown[1]} images/s; {found['disturbed']}",
        flush=True,
    )


def main() -> None:
    parser = parser_of(__doc__)
    options = parser.parse_args()
    quick = options.quick
    bars = Bars("threads", quick)
    lengths = Lengths(8.0, 2.0, 4) if quick else Lengths(20.0, 5.0, 12)
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine()
        made = {
            "command": Trained("command", Path(folder)),
            "one": Trained("plain", Path(folder), OMP_NUM_THREADS="1"),
            "script": Trained("plain", Path(folder)),
            "load 1": Trained("plain", Path(folder)),
            "load 2": Trained("plain", Path(folder)),
        }
        machine.own += [each.process for each in made.values()]
        try:
            for each in made.values():
                each.wait()
            measure(bars, machine, made, lengths)
        finally:
            for each in made.values():
                each.process.kill()
                each.process.wait()
    bars.write()


def measure(bars: Bars, machine: Machine, made: Mapping[str, Trained], lengths: Lengths) -> None:
    command, one, script = made["command"], made["one"], made["script"]
    bars.note_when()
    bars.note("processors", len(allowed_processors()))
    bars.note("load_before", os.getloadavg()[0])

    found = compare(machine, command, script, lengths)
    say("idle", found, ("the command", "an ordinary script"))
    bars.note("idle", found)
    bars.at_least("idle_over_script", found["ratio"]["median"], 0.97)

    def beside(name: str) -> None:
        found = compare(machine, command, one, lengths)
        say(f"beside {name}", found, ("the command", "one thread"))
        if not bars.quick:
            bars.note(f"script_beside_{name}", script.turn(lengths.turn))
        bars.note(f"beside_{name}", found)
        bars.at_least(f"beside_{name}_over_one_thread", found["ratio"]["median"], 0.85)

    with busy_loops(machine):
        beside("loops")
    for load in (made["load 1"], made["load 2"]):
        load.begin(1e9)
    beside("training")


if __name__ == "__main__":
    main()
