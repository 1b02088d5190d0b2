"""Names of shards written as a pattern, as webdataset takes them: shard-{000000..000010}.tar is
eleven shards, {train,test}.tar two."""

from __future__ import annotations

import re

BRACES = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<list>[^{}]+,[^{}]*))\}")
MOST = 100_000  # shards; a slip of the pen could write billions


def is_pattern(name: str) -> bool:
    return "{" in name or "}" in name


def names_of(pattern: str) -> list[str]:
    """Every name that a pattern stands for, in its order; a name without braces is itself.

    Raises:
        ValueError: braces of another form, a range that runs backwards, or too many names.
    """
    found = [""]
    rest = pattern
    while braces := BRACES.search(rest):
        before, rest = rest[: braces.start()], rest[braces.end() :]
        values = _values(braces, pattern)
        if len(found) * len(values) > MOST:
            raise ValueError(f"{pattern}: more than {MOST:,} shards; write a shorter range")
        found = [f"{start}{before}{value}" for start in found for value in values]
        if is_pattern(before):
            break
    names = [f"{start}{rest}" for start in found]
    if is_pattern(names[0]):
        raise ValueError(
            f"{pattern}: braces hold a range or a list, as in shard-{{000..010}}.tar and "
            "{a,b}.tar"
        )
    if len(set(names)) != len(names):
        raise ValueError(f"{pattern}: it names a shard twice; leave one out")
    return names


def _values(braces: re.Match[str], pattern: str) -> list[str]:
    if braces["list"] is not None:
        return [value.strip() for value in braces["list"].split(",")]
    first, last = int(braces["first"]), int(braces["last"])
    if first > last:
        raise ValueError(f"{pattern}: {braces[0]} runs backwards; write the lower number first")
    if last - first >= MOST:
        raise ValueError(f"{pattern}: more than {MOST:,} shards; write a shorter range")
    width = len(braces["first"])
    return [f"{number:0{width}d}" for number in range(first, last + 1)]
