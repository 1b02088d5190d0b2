"""Large blocks that were freed are no longer resident, whatever lies between them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trainer.common import freed_memory

# blocks of 6 MB, beside each a small one that stays; then the large ones are freed
PROGRAM = """
import sys, numpy
from trainer.common.freed_memory import return_freed_memory
def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
print(return_freed_memory() if sys.argv[1] == "set" else None)
numpy.ones(30 * 2**20, numpy.uint8)  # after which the library takes such blocks from its heap
before, kept = resident(), []
large = []
for _ in range(40):
    large.append(numpy.ones(6 * 2**20, numpy.uint8))
    kept.append(numpy.ones(30_000, numpy.uint8))
full = resident()
del large
print(full - before, resident() - before)
"""


def grown(how: str) -> tuple[str, int, int]:
    command = [sys.executable, "-c", PROGRAM, how]
    said, numbers = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    full, left = map(int, numbers.split())
    return said, full, left


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc alone")
def test_what_is_freed_between_other_pieces_goes_back() -> None:
    said, full, left = grown("set")
    assert said == "True" and full > 200e6 and left < 20e6
    said, full, left = grown("unset")
    assert said == "None" and full > 200e6 and left > 150e6  # as it is without


def test_a_users_own_setting_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    assert not freed_memory.return_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda name: object())
    assert not freed_memory.return_freed_memory()
