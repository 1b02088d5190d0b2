"""Threads that do nothing, so that the waiting threads of libgomp sleep soon instead of spinning.

torch's builds for Linux bring libgomp. A thread of it that waits for work spins for 300,000 rounds,
several ms, before it sleeps; for 100 rounds only while libgomp manages more threads than there are
processors (documented at GOMP_SPINCOUNT). So a team of idle threads is started, which puts libgomp
over that limit. Ending the team restores normal spinning.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

from trainer.common.threads import allowed_processors


class Crowd:
    """A team of idle threads in the libgomp that this process has loaded."""

    def __init__(self) -> None:
        self._gone: threading.Event | None = None

    def call(self) -> bool:
        """Starts the team if it is not there; False if no libgomp is loaded."""
        if self._gone is None and (library := loaded_libgomp()) is not None:
            come, self._gone = threading.Event(), threading.Event()
            threading.Thread(target=_stand, args=(library, come, self._gone), daemon=True).start()
            come.wait()
        return self._gone is not None

    def dismiss(self) -> None:
        if self._gone is not None:
            self._gone.set()  # libgomp ends the threads of a team with the one that began it
            self._gone = None


def _stand(library: ctypes.CDLL, come: threading.Event, gone: threading.Event) -> None:
    # any function does for the team that takes a pointer and keeps nothing
    nothing = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p)
    arguments = (nothing, None, len(allowed_processors()) + 1, 0)  # task, data, threads, flags
    library.GOMP_parallel(*arguments)
    come.set()
    gone.wait()


def loaded_libgomp() -> ctypes.CDLL | None:
    """The one this process has loaded already; with several, torch's."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line}
    chosen = sorted(paths, key=lambda path: "/torch/" not in path)
    return ctypes.CDLL(chosen[0]) if chosen else None
