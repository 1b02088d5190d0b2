"""Data workers and the processors they run on; how ranks share a validation."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.data.loader import Batch, RankShare

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


@pytest.mark.parametrize(("count", "ranks"), [(5, 2), (4, 2), (1, 3)])
def test_ranks_share_a_validation_and_count_each_batch_once(count: int, ranks: int) -> None:
    """And each has as many, since they wait for each other."""
    batches = [Batch(number, [], [], [], weights=torch.ones(0)) for number in range(count)]
    shares = [RankShare(copy.deepcopy(batches), rank, ranks) for rank in range(ranks)]
    assert {len(share) for share in shares} == {-(-count // ranks)}
    counted = []
    for share in shares:
        for number in range(len(share)):
            batch = share[number]
            assert isinstance(batch, Batch)
            counted += [batch.step] if batch.counts else []
    assert sorted(counted) == list(range(count))
