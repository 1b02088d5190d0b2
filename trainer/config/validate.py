"""Sections of a recipe validated by pydantic, with errors that name the full key."""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from trainer.config.schema import (
    RecipeError,
)
from trainer.config.tree import refuse_unknown

T = TypeVar("T", bound=BaseModel)


def build_section(cls: type[T], values: Any, key: str) -> T:
    """Validates one flat section; every pydantic complaint becomes a sentence with the full key."""
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise RecipeError(f"{key} is {values!r}; it takes {', '.join(cls.model_fields)}")
    refuse_unknown(values, cls.model_fields, key)
    try:
        built = cls.model_validate(values)
    except ValidationError as error:
        raise RecipeError("; ".join(_sentence(item, key) for item in error.errors())) from None
    for name, value in values.items():
        if isinstance(value, bool) and not isinstance(getattr(built, name), bool):
            raise RecipeError(f"{key}.{name}={value}: a number is needed")
    return built


def _is_key(part: str) -> bool:
    """Whether a place in a pydantic error is a key of the user's; a branch is called by its
    type."""
    return part.isidentifier() and part not in ("str", "int", "float", "bool", "none", "dict")


def _sentence(error: Any, key: str) -> str:
    kind, given = error["type"], error["input"]
    # behind the field come places in a list, keys of a mapping, and names of a union's branches,
    # which say nothing
    places = [str(part) for part in error["loc"][1:] if isinstance(part, int) or _is_key(part)]
    where = ".".join([key, *map(str, error["loc"][:1]), *places])
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"] and re.match(r"\w+=", message):
        return f"{key}.{message}"
    if kind == "missing":
        return f"{where}: a value is needed"
    if kind == "tuple_type":
        message = f"a list is needed, as in {where}=[{given if isinstance(given, str) else '...'}]"
    elif kind == "string_type":
        message = "text is needed; quote what YAML would read otherwise, as in \"'12'\""
    elif kind == "literal_error":
        near = difflib.get_close_matches(str(given), re.findall(r"'(.+?)'", message), n=1)
        message += f"; did you mean {near[0]}?" if near else ""
    return f"{where}: {message}" if isinstance(given, dict) else f"{where}={given!r}: {message}"
