"""A checkpoint is read back as it was written, and one of an earlier format is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.training import checkpoint_files as checkpoint
from trainer.training.checkpoint_files import (
    newest_checkpoint,
    read_checkpoint,
    size_of,
    write_checkpoint,
)


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.stride() == other.stride()
        return same and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(alike, one, other))
    return type(one) is type(other) and one == other


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    moments = {
        number: {"step": torch.tensor(float(number)), "exp_avg": torch.randn(3, number + 1)}
        for number in range(4)
    }
    state = {
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1, 2, 3]}]},
        "rng": [{"torch": torch.get_rng_state(), "python": (3, (1, 2), None)}],
        "parts": {
            "ema": {"steps": 7, "averaged": {"a.b": torch.randn(2, 2, dtype=torch.bfloat16)}},
            "turned": torch.randn(4, 3).t(),
            "empty": torch.zeros(0, 5),
            "flags": torch.tensor([True, False]),
            "pair": (torch.ones(2), torch.zeros(1)),
        },
    }
    weights = {"w": torch.randn(3, 2)}
    made = write_checkpoint(tmp_path, weights, state, {"step": 3, "micro_step": 6})
    found, read = read_checkpoint(checkpoint.verified(made.folder))
    assert alike(found, weights) and alike(read, state)
    alone = read["optimizer"]["state"][0]["exp_avg"].untyped_storage().nbytes()
    assert alone == 3 * 4  # none keeps the others in memory


@pytest.mark.parametrize("tidy", [False, True])
def test_an_earlier_format_is_refused_and_stays_as_it_is(tmp_path: Path, tidy: bool) -> None:
    made = write_checkpoint(tmp_path, {"w": torch.ones(2)}, {}, {"step": 3, "micro_step": 6})
    manifest = {**made.manifest, "format": "attention-trainer-checkpoint-1"}
    sealed = {**manifest, "sha256": checkpoint._seal(manifest)}
    (made.folder / "manifest.json").write_text(json.dumps(sealed))
    with pytest.raises(ValueError, match="step-000003 is a checkpoint of an earlier version"):
        newest_checkpoint(tmp_path, print, tidy=tidy)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_a_step_that_is_written_again_replaces_the_earlier(tmp_path: Path) -> None:
    facts = {"step": 3, "micro_step": 6}
    for value in (1.0, 2.0):
        made = write_checkpoint(tmp_path, {"w": torch.full((2,), value)}, {"n": value}, facts)
    found, read = read_checkpoint(checkpoint.verified(made.folder))
    assert found["w"].tolist() == [2.0, 2.0] and read == {"n": 2.0}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_all_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    flush = os.fsync

    def spied(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").resolve())
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", spied)
    write_checkpoint(tmp_path, {"w": torch.ones(2)}, {"n": 1}, {"step": 3, "micro_step": 6})
    *before, last = flushed
    part = tmp_path / f".step-000003.{os.getpid()}.part"
    names = {part / "weights.safetensors", part / "state.pt", part / "manifest.json", part}
    assert set(before) == names and last == tmp_path


def test_the_room_that_is_needed_counts_every_tensor() -> None:
    """In mappings, sequences and both; 4 bytes each of fp32, 2 of bf16."""
    one, half = torch.zeros(3, 5), torch.zeros(7, dtype=torch.bfloat16)
    assert size_of({"a": one, "b": [half, (one, {"c": half})], "d": "text", "e": 3}) == 148
