"""What a form writes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trainer.export.bundle import Bundle
from trainer.export.extract import extract, inserted


@dataclass
class Job:
    """live: the adapted model; fresh: makes its base anew, stored as in training; stored: names of
    the adapter's tensors; title: what to call the file."""

    live: Any
    fresh: Callable[[], Any]
    stored: tuple[str, ...]
    title: str

    @cached_property
    def base(self) -> Any:
        """The base to look at; never edited."""
        return self.fresh()

    @cached_property
    def bundle(self) -> Bundle:
        return extract(self.live, self.base, self.stored)

    @property
    def inserts(self) -> bool:
        """Whether the adapter brings layers that its base lacks."""
        return bool(inserted(self.live, self.base))
