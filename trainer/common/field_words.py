"""The type of an option in plain words, as messages and `help` print it."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

NOUNS: dict[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    Any: "any value",
}
# attributes of pydantic's constraints
LIMIT_WORDS = {"gt": "above", "ge": "at least", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Called:
    """Put into `Annotated[...]`, it names what a text or a number stands for."""

    noun: str


def type_of(field: FieldInfo) -> str:
    """As in `whole number, at least 1` or `fp32, bf16 or null`."""
    kinds, null = _branches(field.annotation)
    kind, metadata = _unwrapped(kinds[0], field)
    noun = _noun(kind if len(kinds) == 1 else field.annotation, metadata)
    if limits := _bounds(metadata, kind):
        return f"{noun}, {limits}" + (", or null" if null else "")
    return noun if not null else f"{noun}, or null" if " " in noun else f"{noun} or null"


def default_of(field: FieldInfo) -> str:
    """As in `default 4`, as it would be written in a recipe; or `required`."""
    if field.is_required():
        return "required"
    return f"default {_written(field.get_default(call_default_factory=True))}"


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if str(value) else '""'


def needed(field: FieldInfo) -> str | None:
    """What a wrong value is answered with, as in `a whole number is needed, at least 1`; None for
    lists and mappings, where the wrong part is inside."""
    kinds, _ = _branches(field.annotation)
    kind, metadata = _unwrapped(kinds[0], field)
    if len(kinds) > 1 and words_of_choice(field):
        return f"{_noun(field.annotation)} is needed"
    if len(kinds) != 1 or typing.get_origin(kind) not in (None, typing.Literal):
        return None
    noun, limits = _noun(kind, metadata), _bounds(metadata, kind)
    article = "" if noun == "text" or " or " in noun else "a "
    return f"{article}{noun} is needed" + (f", {limits}" if limits else "")


def words_of_choice(field: FieldInfo) -> list[str]:
    """The words an option takes, as it has a few or is true or false; none where it takes others
    too."""
    kinds, null = _branches(field.annotation)
    found: list[str] = []
    for kind in kinds:
        if kind is bool:
            found += ["true", "false"]
        elif typing.get_origin(kind) is typing.Literal:
            found += map(str, typing.get_args(kind))
        else:
            return []
    return [*found, "null"] if null else found


def choice(items: Iterable[Any], last: str = "or") -> str:
    """`a`, `a or b`, `a, b or c`."""
    *most, final = map(str, items)
    return f"{', '.join(most)} {last} {final}" if most else final


def _noun(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    for item in metadata:
        if isinstance(item, Called):
            return item.noun
    kinds, _ = _branches(annotation)
    if len(kinds) > 1 and bool in kinds:  # at the end, as in `auto, true or false`
        kinds = [kind for kind in kinds if kind is not bool] + [typing.Literal["true", "false"]]
    nouns = [
        noun
        for kind in kinds
        for noun in (
            typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else [_named(kind)]
        )
    ]
    return choice(dict.fromkeys(nouns))


def _branches(annotation: Any) -> tuple[list[Any], bool]:
    """The members of a union but null, and whether null is one; of anything else itself."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return [annotation], False
    members = typing.get_args(annotation)
    kinds = [kind for kind in members if kind is not type(None)]
    return kinds, len(kinds) < len(members)


def _unwrapped(kind: Any, field: FieldInfo) -> tuple[Any, list[Any]]:
    """A type without `Annotated`, and the constraints on it and on its field."""
    if typing.get_origin(kind) is not typing.Annotated:
        return kind, field.metadata
    return typing.get_args(kind)[0], [*typing.get_args(kind)[1:], *field.metadata]


def _named(kind: Any) -> str:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        noun, limits = _noun(inside[0], inside[1:]), _bounds(inside[1:], inside[0])
        return f"{noun} {limits}" if limits else noun
    if origin is tuple and inside[-1:] != (...,):
        return f"list of {len(inside)}: {', '.join(map(_named, inside))}"
    if origin in (tuple, list):
        return f"list of {_noun(inside[0])}"
    if origin in (dict, Mapping):
        return f"mapping of {_noun(inside[0])} to {_noun(inside[1])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"{{{', '.join(kind.model_fields)}}}"
    return NOUNS.get(kind) or str(getattr(kind, "__name__", kind))


def _bounds(metadata: Iterable[Any], kind: Any) -> str:
    """Limits as in `at least 1 and below 8`."""
    found = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            found.append(_bounds(item.metadata, kind))
        for name, words in LIMIT_WORDS.items():
            limit = getattr(item, name, None)
            if limit is None:
                continue
            if name == "gt" and kind is int:
                words, limit = "at least", limit + 1
            found.append(f"{words} {'2^63' if limit == 2**63 else format(limit, 'g')}")
        if getattr(item, "min_length", None) == 1:
            found.append("not empty")
    return " and ".join(filter(None, found))
