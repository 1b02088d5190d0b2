"""What ranks tell each other, between two processes over gloo, and with one alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.training.distributed import gather_values, largest, num_ranks, value_of_first

WORLD = 2


def tell(rank: int, folder: str) -> None:
    """One of the processes: asks everything and writes the answers down."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
    )
    flags = torch.tensor([float(rank), 5.0 - rank, -1.0])
    found: dict[str, Any] = {
        "ranks": num_ranks(),
        "gathered": gather_values({"rank": rank, "keys": ["a"] * rank}),
        "first": value_of_first(["the first", rank]),
        "largest": largest(flags).tolist(),
        "untouched": flags.tolist(),
    }
    torch.distributed.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.ddp
def test_two_processes_hear_of_each_other(tmp_path: Path) -> None:
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in range(WORLD)]
    ranks = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    for rank in range(WORLD):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {
            "ranks": 2,
            "gathered": [{"rank": 0, "keys": []}, {"rank": 1, "keys": ["a"]}],
            "first": ["the first", 0],
            "largest": [1.0, 5.0, -1.0],
            "untouched": [float(rank), 5.0 - rank, -1.0],
        }


def test_one_process_hears_of_itself() -> None:
    assert num_ranks() == 1
    assert gather_values("own") == ["own"]
    assert value_of_first(3) == 3
    assert largest(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]


if __name__ == "__main__":
    tell(int(sys.argv[1]), sys.argv[2])
