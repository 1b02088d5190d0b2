"""Trees of plain values: read from YAML, laid over each other."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import AliasToken, YAMLError, scan

from trainer.common import secrets
from trainer.config.schema import (
    KEYS,
    RecipeError,
)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_aliases(path, text)
        tree = deepcopy(_parsed(text))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path}: not readable as YAML: {reason}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of {', '.join(KEYS[1:])}")
    return plain_value(tree, "")


@lru_cache(maxsize=32)  # a command reads a recipe several times
def _parsed(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.load(StringIO(text)))


def _refuse_aliases(path: Path, text: str) -> None:
    """A few lines of them, each naming the one before several times, would fill the memory."""
    if "*" in text and any(isinstance(token, AliasToken) for token in scan(text)):
        raise RecipeError(
            f"{path}: YAML aliases (*name) are not read; write the value out, or use base: <recipe>"
        )


def merge_trees(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`: mappings merge, everything else replaces."""
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = merge_trees(below, value)
        merged[key] = value
    return merged


def plain_value(value: Any, key: str) -> Any:
    """Only plain data passes: no interpolation, no `_target_`, nothing that JSON has not, and no
    access token."""
    if isinstance(value, dict):
        if "_target_" in value:
            where = f"{key}._target_" if key else "_target_"
            raise RecipeError(f"{where}: recipes name files of ours, never import paths; remove it")
        return {
            str(name): plain_value(item, f"{key}.{name}" if key else str(name))
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [plain_value(item, f"{key}.{number}") for number, item in enumerate(value)]
    if isinstance(value, str) and "${" in value:
        raise RecipeError(
            f"{key}: interpolation (${{...}}) is not allowed in recipes; write the value"
        )
    if isinstance(value, str) and (token := secrets.kind_of(value)):
        raise RecipeError(
            f"{key}: an access token ({token}...); a recipe is written into the run folder, the "
            "adapter and the tracker, so keep the token in the environment, and renew this one"
        )
    if not isinstance(value, str | int | float | None):
        raise RecipeError(
            f"{key}: {type(value).__name__} is no plain value; write text or a number"
        )
    return value
