"""The error of a format that has no place for an adapter."""

from __future__ import annotations


class CannotCarryError(ValueError):
    """A format has no place for an adapter. The message says for what part of it; `export` adds
    the formats that have one."""
