"""What has averaged weights for validation, previews and the adapter: `ema.py`, or the optimiser
itself, `schedule_free.py`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from trainer.training.module import DiffusionModule


class Average(Protocol):
    """A callback that gives the module averaged weights during validation, and on request."""

    def swapped(self, module: DiffusionModule) -> AbstractContextManager[None]:
        """The module has averaged weights inside the block, and its own again after it."""
        ...

    def take_back(self, module: DiffusionModule) -> None:
        """Gives the module its own weights back, if it has the averaged ones."""
        ...
