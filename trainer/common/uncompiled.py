"""Imports of libraries that would compile functions of theirs at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

UNCOMPILED = "TORCHDYNAMO_DISABLE"  # torch's own: torch.compile gives the function as it is


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Inside, what is imported compiles nothing, as bitsandbytes would its kernels for the CPU, for
    which it imports the whole compiler of torch: a tenth of the time that a plan takes, or a run
    to its first step. Whoever compiles afterwards, as run.compile does, imports it then."""
    before = os.environ.get(UNCOMPILED)
    os.environ[UNCOMPILED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[UNCOMPILED]
        else:
            os.environ[UNCOMPILED] = before
