"""A key that a recipe does not have is refused, with the nearest one that it has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trainer.common.suggest import nearest
from trainer.config.schema import RecipeError


def refuse_unknown(values: Mapping[str, Any], known: Iterable[str], prefix: str) -> None:
    known = list(known)
    for name in values:
        if name not in known:
            dotted = f"{prefix}." if prefix else ""
            raise RecipeError(f"{dotted}{name}: no such key{nearest(name, known, dotted)}")
