"""A run keeps the number of threads it began with."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from trainer.common import threads
from trainer.common.threads import this_machine, thread_count
from trainer.training.thread_count import settle_threads


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> int:
    """An environment in which the user has set nothing; how many threads this machine takes."""
    for name in (*threads.USERS, threads.OWN, "SLURM_CPUS_PER_TASK", "SLURM_PROCID"):
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)
    count = thread_count(this_machine(), {})
    torch.set_num_threads(count)
    return count


def settled(ranks: int = 1, **manifest: Any) -> tuple[int, list[str]]:
    said: list[str] = []
    settle_threads(ranks=ranks, machines=1, manifest=manifest, say=said.append)
    return torch.get_num_threads(), said


def test_a_new_run_takes_what_the_machine_has(nothing_set: int) -> None:
    assert settled() == (nothing_set, [])
    assert "OMP_NUM_THREADS" not in os.environ


def test_ranks_of_one_machine_share_it_and_their_processes_know_whose_choice_it_was(
    nothing_set: int,
) -> None:
    assert settled(ranks=2) == (max(1, nothing_set // 2), [])
    assert os.environ["OMP_NUM_THREADS"] == str(max(1, nothing_set // 2))
    assert not threads.set_by_user(os.environ)


def test_a_resumed_run_keeps_its_number(nothing_set: int) -> None:
    assert settled(threads=nothing_set, world_size=1) == (nothing_set, [])
    count, said = settled(threads=nothing_set + 1, world_size=1)
    assert count == nothing_set + 1
    assert len(said) == 1 and f"OMP_NUM_THREADS={nothing_set} " in said[0]


def test_a_lower_number_of_this_process_is_for_new_runs(nothing_set: int) -> None:
    torch.set_num_threads(1)
    assert settled() == (1, [])
    assert settled(threads=nothing_set, world_size=1) == (nothing_set, [])


def test_another_number_of_ranks_begins_anew(nothing_set: int) -> None:
    assert settled(threads=nothing_set + 1, world_size=2) == (nothing_set, [])
    assert settled(threads=nothing_set + 1) == (nothing_set, [])  # an older checkpoint


def test_what_the_user_set_stands_and_its_price_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    assert settled(ranks=2) == (1, [])
    assert settled(threads=1, world_size=1) == (1, [])
    count, said = settled(threads=2, world_size=1)
    assert count == 1
    assert len(said) == 1 and "2 threads" in said[0] and "differ" in said[0]
