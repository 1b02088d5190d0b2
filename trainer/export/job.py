"""What a format writes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from trainer.export.bundle import Bundle
from trainer.export.card import Card
from trainer.export.extract import extract, inserted


@dataclass(frozen=True)
class Job:
    """One adapter to write.

    adapted: the adapted model; make_base: makes a new copy of its base, stored as in training;
    stored: the names of the adapter's tensors; title: what to call the file; given: the bundle to
    write instead of the adapter's own; card: what the files say of the adapter.
    """

    adapted: Any
    make_base: Callable[[], Any]
    stored: tuple[str, ...]
    title: str
    given: Bundle | None = None
    card: Card = field(default_factory=Card)

    @cached_property
    def base(self) -> Any:
        """A base for reading only; it must not be changed."""
        return self.make_base()

    @cached_property
    def bundle(self) -> Bundle:
        """What the adapter adds to its base."""
        return self.given or extract(self.adapted, self.base, self.stored)

    @property
    def dropped(self) -> tuple[str, ...]:
        """The adapter's tensors that the bundle has no place for; none if no bundle was made."""
        return self.bundle.dropped if "bundle" in vars(self) else ()

    @property
    def inserts(self) -> bool:
        """Whether the adapter brings layers that its base lacks."""
        return bool(inserted(self.adapted, self.base))

    def with_bundle(self, bundle: Bundle) -> Job:
        """The same job with another bundle."""
        return replace(self, given=bundle)
