"""Shares of pictures, as in "31 of 32 are right", and how far chance may have moved them."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)  # 1.96: of a normal distribution 95 % lie within


class Share(float):
    """A share of 1 that remembers of how many pictures it is; a plain float to all arithmetic."""

    count: int

    def __new__(cls, value: float, count: int) -> Share:
        made = super().__new__(cls, value)
        made.count = count
        return made

    def __getnewargs__(self) -> tuple[float, int]:  # type: ignore[override]
        """What `copy` and `pickle` make it of."""
        return float(self), self.count

    @property
    def interval(self) -> tuple[float, float]:
        """As `wilson`."""
        return wilson(self, self.count)


def share(hits: Iterable[bool]) -> Share:
    """The share of those that are true."""
    listed = list(hits)
    return Share(sum(listed) / len(listed), len(listed))


def wilson(value: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` independent pictures, by Wilson's score (1927): all
    true shares that would not be refused, at 5 %, by what was seen. Within 0 and 1, and of some
    width even at the ends."""
    spread = Z**2 / count
    middle = (value + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * sqrt(value * (1 - value) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def percent(value: float | None) -> str:
    """A share of 1 as text, with its 95 % interval where it is known of how many pictures it is;
    `-` where it is unknown itself."""
    if value is None:
        return "-"
    text = f"{100 * value:.1f} %"
    if not isinstance(value, Share):
        return text
    low, high = value.interval
    return f"{text} ({100 * low:.1f} to {100 * high:.1f})"
