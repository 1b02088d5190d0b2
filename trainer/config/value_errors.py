"""Sections of a recipe validated by pydantic, with errors that name the full key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from trainer.common.field_words import needed, type_of
from trainer.common.section import keys_of
from trainer.config.optimisers import CALLED
from trainer.config.schema import RecipeError
from trainer.config.unknown_keys import refuse_unknown

# pydantic's names for values of a wrong type or out of range
PLAIN_KINDS = (
    "bool_parsing", "bool_type", "float_parsing", "float_type", "int_from_float", "int_parsing",
    "int_parsing_size", "int_type", "greater_than", "greater_than_equal", "less_than",
    "less_than_equal",
)  # fmt: skip

T = TypeVar("T", bound=BaseModel)


def build_section(cls: type[T], values: Any, key: str) -> T:
    """Validates one flat section; every pydantic complaint becomes a sentence with the full key.

    key: the section's name in the recipe; empty where its fields are given without one.
    """
    values, fields = {} if values is None else values, keys_of(cls)
    if not isinstance(values, dict):
        raise RecipeError(f"{key} is {values!r}; it takes {', '.join(fields)}")
    refuse_unknown(values, fields, key)
    for name, value in values.items():
        field = fields[name]
        if isinstance(value, bool) and "true or false" not in type_of(field):  # 1, to pydantic
            wanted = needed(field) or f"{type_of(field)} is needed"
            raise RecipeError(f"{_joined(key, name)}={value}: {wanted}")
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        found = _one_of_a_choice(error.errors())
        raise RecipeError("; ".join(_sentence(item, cls, key) for item in found)) from None


def _one_of_a_choice(errors: Sequence[Any]) -> list[Any]:
    """Without what pydantic says of true or false, where the field takes words too."""
    words = {item["loc"][:1] for item in errors if item["type"] == "literal_error"}
    return [
        item
        for item in errors
        if not (item["type"].startswith("bool_") and item["loc"][:1] in words)
    ]


def _joined(*parts: str) -> str:
    return ".".join(filter(None, parts))


def _is_key(part: str) -> bool:
    """Whether a part of a pydantic error's location is a key of the user's, and not the name of a
    type, as which a branch of a union is listed."""
    return part.isidentifier() and part not in ("str", "int", "float", "bool", "none", "dict")


def _sentence(error: Any, cls: type[BaseModel], key: str) -> str:
    # after the field, a location lists positions in a list, keys of a mapping, and the branches of
    # a union, which tell the user nothing
    inside = [str(part) for part in error["loc"][1:] if isinstance(part, int) or _is_key(part)]
    where = _joined(key, *map(str, error["loc"][:1]), *inside)
    message, given = error["msg"].removeprefix("Value error, "), error["input"]
    if not error["loc"]:
        return _joined(key, message) if re.match(r"\w+=", message) else _about(key, message)
    field = keys_of(cls)[str(error["loc"][0])]
    if error["type"] == "missing":
        if not inside and field.examples:
            return f"{where} is missing, as in {where}={field.examples[0]}"
        return f"{where}: a value is needed"
    message = _reason(error, where, message, wanted=None if inside else needed(field))
    return f"{where}: {message}" if isinstance(given, dict) else f"{where}={given!r}: {message}"


def _about(key: str, message: str) -> str:
    return f"{key}: {message}" if key else message


def _reason(error: Any, where: str, message: str, wanted: str | None) -> str:
    """What is wrong with a value. wanted: what its field takes, in plain words, if that is one
    plain value; `message`, pydantic's own sentence, is used otherwise."""
    kind, given = error["type"], error["input"]
    if kind == "tuple_type":
        return f"a list is needed, as in {where}=[{given if isinstance(given, str) else '...'}]"
    if kind in ("string_type", "path_type"):
        text = "12" if isinstance(given, dict) else given
        return f"text is needed; quote it, as in {where}=\"'{text}'\""
    if kind == "literal_error":
        words = re.findall(r"'(.+?)'", message)
        meant = CALLED.get(str(given).lower())
        near = [meant] if meant in words else difflib.get_close_matches(str(given), words, n=1)
        return (wanted or message) + (f"; did you mean {near[0]}?" if near else "")
    if kind == "extra_forbidden":
        return "no such key"
    if kind == "finite_number":
        return "a finite number is needed"
    return wanted if wanted and kind in PLAIN_KINDS else message
