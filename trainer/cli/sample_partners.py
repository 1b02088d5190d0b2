"""Options of `sample` that have no effect because another one is not as they need it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEEDED = {
    "strength": ("image", "it is how much of a picture changes; give image= too"),
    "start": ("source", "it says how a clip of source= begins; give source= too"),
}


def refuse_idle_options(given: Mapping[str, Any]) -> None:
    """given: what a user has given, by name; a picture that is made again brings its own beside it.

    Raises:
        ValueError: an option has no effect; the message begins with it.
    """
    for name, (partner, why) in NEEDED.items():
        if name in given and given.get(partner) is None:
            raise ValueError(f"{name}={given[name]} has no effect: {why}")
    guidance = given.get("guidance")
    if given.get("negative") and isinstance(guidance, int | float) and guidance <= 1:
        raise ValueError(
            f"negative={given['negative']} has no effect: guidance={guidance:g} does not guide; it "
            "is for more than 1"
        )
