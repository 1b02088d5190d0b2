"""`key=value` words as a tree of plain values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainer.config.schema import (
    RecipeError,
)
from trainer.config.tree import merge_trees, plain_value

PLACE = re.compile(r"\{(token|class)\}")  # of prompts, see data/caption_templates.py
MARKS = ("\ue000", "\ue001")  # for the braces of places, which YAML reads as a mapping
KEY = re.compile(r"\w[\w-]*(\.\w[\w-]*)*")


def parse_words(arguments: Iterable[str]) -> dict[str, Any]:
    """`key=value` words to a tree; see `_value` for what the values may be."""
    seen: set[str] = set()
    tree: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not KEY.fullmatch(key):
            bare = "; leave the dashes out" if argument.startswith("-") else ""
            raise RecipeError(f"{argument!r} is not key=value, as in optim.lr=1e-4{bare}")
        if key in seen:
            raise RecipeError(f"{key} is given twice")
        seen.add(key)
        word = _value(plain_value(text, key))
        for part in reversed(key.split(".")):
            word = {part: word}
        tree = merge_trees(tree, plain_value(word, ""))  # which copies what `_value` keeps
    return tree


@lru_cache(maxsize=256)  # a command reads its words several times
def _value(text: str) -> Any:
    """`1e-4`, `true`, `null`, `[a, b]` and `{a: 1}` are YAML; the rest is text, so that a prompt
    with colons, brackets or a # stays what it is. Quotes make text of anything. {token} and {class}
    are text too, inside a list as well."""
    begin = "" if PLACE.match(text.strip()) else text.strip()[:1]
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={_hidden(text)}"]))
    except (OmegaConfBaseException, YAMLError, AttributeError):
        return text
    assert isinstance(value, dict)
    value = _shown(value["value"])
    structure = isinstance(value, dict | list) and begin not in ("[", "{")
    comment = value is None and text.strip().lower() not in ("null", "~")
    bare = isinstance(value, str | bytes) and begin not in ("'", '"')
    return text if structure or comment or bare else value


def _hidden(text: str) -> str:
    return PLACE.sub(rf"{MARKS[0]}\1{MARKS[1]}", text)


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(MARKS[0], "{").replace(MARKS[1], "}")
    if isinstance(value, list):
        return [_shown(item) for item in value]
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    return value
