"""What is shown of work that takes long outside the training loop: how much is done, and the time
left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.common.threads import first_process

LINE_EVERY = 10.0  # seconds between lines where stderr is no terminal


@dataclass(frozen=True)
class LongWork:
    """How far some work is. Called with the number of pieces that were just finished; `found` takes
    pieces out of the count that turn out to be there already, so that the time left is that of the
    others."""

    done: Callable[[int], None]
    found: Callable[[int], None]

    def __call__(self, count: int) -> None:
        self.done(count)


@contextmanager
def long_work(what: str, total: int, done: int = 0) -> Iterator[LongWork]:
    """Shows on stderr how far some work is; the block calls what it is given with the number of
    pieces it has just finished.

    A terminal shows a bar with the time left. Elsewhere a line is printed every `LINE_EVERY`
    seconds, and one at the end. Of several processes the first one shows it.

    what: the pieces, as in "class images". total: how many there are, of which `done` were there
    before.
    """
    console = Console(stderr=True)
    if not first_process(os.environ):
        yield LongWork(lambda count: None, lambda count: None)
    elif console.is_terminal:
        with _bar(console) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield LongWork(
                lambda count: bar.advance(task, count),
                lambda count: bar.update(task, total=(bar.tasks[task].total or 0) - count),
            )
    else:
        lines = _Lines(console, what, total=total, done=done)
        yield LongWork(lines.advance, lines.found)


def _bar(console: Console) -> Progress:
    shown = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*shown, console=console)


class _Lines:
    """Lines of text in place of a bar."""

    def __init__(self, console: Console, what: str, *, total: int, done: int) -> None:
        self.console, self.what, self.total = console, what, total
        self.first = self.done = done
        self.started = self.printed = time.monotonic()
        if done:
            self._print(f"{done} of {total} are there already")

    def found(self, count: int) -> None:
        self.total -= count

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        spent = now - self.started
        if self.done >= self.total:
            self._print(f"{self.done} of {self.total} after {duration(spent)}")
        elif now - self.printed >= LINE_EVERY and self.done > self.first:
            left = spent / (self.done - self.first) * (self.total - self.done)
            self._print(f"{self.done} of {self.total}, about {duration(left)} left")
            self.printed = now

    def _print(self, text: str) -> None:
        self.console.print(f"{self.what}: {text}", highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds for people: 12 s, 3.5 min, 1.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
