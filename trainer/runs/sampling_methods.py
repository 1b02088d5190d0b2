"""Methods that are given beside a trained adapter, for sampling alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainer.config import load
from trainer.methods.apply import find_method

if TYPE_CHECKING:
    from trainer.methods.method import Method


def sampling_methods(
    trained: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Method], dict[str, Method]]:
    """The methods of an adapter with the options that are given for their sampling, and those that
    are given beside them.

    Raises:
        ValueError: an option of a trained method that is not for sampling alone, or no method.
    """
    own = dict(trained)
    for name in trained.keys() & given.keys():
        cls, options = find_method(name), given[name] or {}
        if fixed := sorted(set(options) - cls.when_sampling):
            free = ", ".join(sorted(cls.when_sampling)) or "it has none"
            raise ValueError(
                f"methods.{name}.{fixed[0]} is what the adapter was trained with; options of "
                f"{name} that are for sampling alone: {free}"
            )
        own[name] = {**(trained[name] or {}), **options}
    further = {name: options for name, options in given.items() if name not in trained}
    return load.methods_of(own), load.methods_of(further) if further else {}
