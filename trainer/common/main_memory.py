"""How much main memory is free, by what the system says."""

from __future__ import annotations

import os
from pathlib import Path

MEMINFO, LIMIT, USED, KINDS = (
    Path("/proc/meminfo"),
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory.current"),
    Path("/sys/fs/cgroup/memory.stat"),
)
# of what a container uses, files that are kept in memory while nobody needs it
CACHE = ("inactive_file", "active_file")


def free_memory() -> int | None:
    """Bytes that a program can still get: on Linux what is available, and within the limit of its
    container; elsewhere all that the machine has; None where the system says neither."""
    known = [free for free in (_available(), _within_limit()) if free is not None]
    if known:
        return min(known)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has none of it
        return None


def _available() -> int | None:
    try:
        lines = MEMINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(words[1]) * 1024 for words in found), None)


def _within_limit() -> int | None:
    try:
        limit, used = (path.read_text(encoding="utf-8").strip() for path in (LIMIT, USED))
    except OSError:
        return None
    if not (limit.isdecimal() and used.isdecimal()):
        return None
    return int(limit) - max(0, int(used) - _cached())


def _cached() -> int:
    """Bytes of files that the system keeps for the container and gives up when it needs memory."""
    try:
        lines = KINDS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    found = (line.split() for line in lines)
    return sum(int(words[1]) for words in found if words[0] in CACHE)
