"""What an optimiser step spends its time on."""

from __future__ import annotations

import time

import torch

PARTS = ("forward", "backward", "optimizer")
Mark = float | torch.cuda.Event


class StepClock:
    """Marks the ends of the parts of batches: forward, backward, and what is left until the batch
    ends, the optimiser where there is a step.

    On CUDA, where the device is behind the program, the marks are events in its own order of work,
    which are read when the sums are asked for.
    """

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.batches: list[list[Mark]] = []

    def begin(self) -> None:
        """A batch begins."""
        self.batches.append([self._now()])

    def mark(self) -> None:
        """A part of the batch has ended."""
        if self.batches:
            self.batches[-1].append(self._now())

    def take(self) -> dict[str, float]:
        """Seconds of each part over all batches since it was asked last; batches that did not come
        to their end are left out."""
        whole = [marks for marks in self.batches if len(marks) == len(PARTS) + 1]
        self.batches = []
        if self.cuda and whole:
            torch.cuda.synchronize()
        return {
            part: sum(_between(marks[i], marks[i + 1]) for marks in whole)
            for i, part in enumerate(PARTS)
        }

    def _now(self) -> Mark:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(before: Mark, after: Mark) -> float:
    """Seconds."""
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    return before.elapsed_time(after) / 1000  # type: ignore[union-attr, arg-type]
