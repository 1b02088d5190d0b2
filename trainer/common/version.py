"""Which version of this toolkit it is."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from trainer.common.program import NAME

LIBRARIES = ("torch", "lightning", "diffusers", "transformers", "peft")  # that results depend on


def name_and_version() -> str:
    """What a file says that it was made by."""
    return f"{NAME} {own_version()}"


@cache
def own_version() -> str:
    """The installed version, as in `0.1.0`; `source` for a checkout that is not installed."""
    try:
        return version(NAME)
    except PackageNotFoundError:
        return "source"


def versions() -> list[str]:
    """The version of this toolkit, then those of Python and of the libraries; a line each. They are
    read from what was installed, and nothing is imported."""
    lines = [name_and_version(), f"python {platform.python_version()}"]
    for library in LIBRARIES:
        try:
            lines.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            lines.append(f"{library} is not installed")
    return lines
