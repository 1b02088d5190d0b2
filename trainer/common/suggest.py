"""The end of a message about an unknown name: the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(wrong: str, right: Iterable[str], prefix: str = "") -> str:
    """`; did you mean <the nearest>?`, with `prefix` before its name; where none is near, all
    names."""
    right = list(right)
    near = difflib.get_close_matches(wrong, right, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else f"; there are: {', '.join(right)}"
