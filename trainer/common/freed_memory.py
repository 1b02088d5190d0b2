"""Memory that a program has freed goes back to the system, where the C library keeps it otherwise.

glibc takes blocks of up to 32 MB from one heap, of which only the end can go back: what is freed
between pieces that are still in use stays with the process, in training often as much as a step
needs at once. Blocks of `LARGE` bytes and more, as most activations of large models are, get pages
of their own here, which go back when they are freed; smaller ones are taken from the heap as ever.
New pages cost time, which is little beside what a large model calculates with them.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

LARGE = 2**20  # bytes
KEPT = 32 * 2**20  # free bytes at the end of the heap that stay for the next blocks
WORTH = 10**9  # bytes of the weights of a model that is large
TRIM, MMAP = -1, -3  # the names of these two settings in malloc.h
USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def return_freed_memory() -> bool:
    """Sets this up for the process. Returns False where nothing is changed: the user has set it, or
    the C library is another one."""
    if any(name in os.environ for name in USERS):
        return False
    with suppress(AttributeError, OSError, TypeError):  # macOS and Windows lack it
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(MMAP, LARGE)) and bool(mallopt(TRIM, KEPT))
    return False
