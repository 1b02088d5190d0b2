"""A key that a recipe does not have is refused, with the one that was meant: by the name that other
trainers have for it, or the nearest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trainer.common.suggest import nearest
from trainer.config.schema import RecipeError
from trainer.config.synonyms import meant_keys


def refuse_unknown(values: Mapping[str, Any], known: Iterable[str], prefix: str) -> None:
    known = list(known)
    for name in values:
        if name not in known:
            dotted = f"{prefix}." if prefix else ""
            meant = meant_keys(name, known, prefix, values=values)
            hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
            hint = hint or nearest(name, known, dotted)
            raise RecipeError(f"{dotted}{name}: no such key{hint}")
