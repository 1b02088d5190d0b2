"""Data workers and the processors they run on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os
import torch
from trainer.common.threads import ALL
from trainer.data.loader import loader

class Seen(torch.utils.data.Dataset):
    def __getitem__(self, step):
        return [len(os.sched_getaffinity(0)), torch.get_num_threads()]

if __name__ == "__main__":
    everywhere = sorted(os.sched_getaffinity(0))
    os.environ[ALL] = ",".join(map(str, everywhere))
    os.sched_setaffinity(0, everywhere[:1])
    print(*loader(Seen(), total=1, start=0, workers=1))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sets the processors of a thread")
def test_a_worker_runs_everywhere_while_training_is_gathered(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "program.py")],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == f"[{len(os.sched_getaffinity(0))}, 1]", done.stderr
