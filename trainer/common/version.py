"""Which version of this toolkit it is."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

NAME = "attention-trainer"


@cache
def own_version() -> str:
    """The installed version, as in `0.1.0`; `source` for a checkout that is not installed."""
    try:
        return version(NAME)
    except PackageNotFoundError:
        return "source"
