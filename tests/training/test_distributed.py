"""What ranks tell each other, between two processes over gloo, and with one alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import server
from told import WORLD, tell

from trainer.training.distributed import gather_values, largest, num_ranks, value_of_first


@pytest.mark.ddp
def test_two_processes_hear_of_each_other(tmp_path: Path) -> None:
    ranks = [server().Process(target=tell, args=(rank, tmp_path)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
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
