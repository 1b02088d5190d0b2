"""What has averaged weights for validation, previews and the adapter: `ema.py`, or the optimiser
itself, `schedule_free.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from trainer.training.module import DiffusionModule


class Average(Protocol):
    """A callback that gives the module averaged weights during validation, and on request."""

    def give(self, module: DiffusionModule) -> None:
        """Gives the module averaged weights."""
        ...

    def take_back(self, module: DiffusionModule) -> None:
        """Gives the module its own weights back, if it has the averaged ones."""
        ...


@contextmanager
def averaged(average: Average | None, module: DiffusionModule) -> Iterator[None]:
    """The module has averaged weights inside the block, where there are any, and its own again
    after it."""
    if average is None:
        yield
        return
    average.give(module)
    try:
        yield
    finally:
        average.take_back(module)
