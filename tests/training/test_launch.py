"""Lightning's trainer, and how a loop that is left early ends on each rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from trainer.common.exit_codes import TERMINATED, LeaveError
from trainer.config.load import load_recipe
from trainer.training.launch import ending, is_child, make_trainer, measured_of


def rank(number: int, environment: Any) -> Any:
    strategy = SimpleNamespace(cluster_environment=environment)
    return SimpleNamespace(strategy=strategy, local_rank=number, global_rank=number)


@pytest.mark.parametrize(
    ("number", "started_here", "child"),
    [(0, True, False), (1, True, True), (1, False, False), (0, False, False)],
)
def test_a_rank_that_the_first_one_started_leaves_without_a_code(
    number: int, started_here: bool, child: bool, tmp_path: Path
) -> None:
    """Lightning would kill the first rank, which is saving, for a child's code; a rank of a batch
    system has one of its own."""
    trainer = rank(number, LightningEnvironment() if started_here else object())
    assert is_child(trainer) == child
    with pytest.raises(LeaveError) as left, ending(trainer, tmp_path):
        raise LeaveError(TERMINATED, "SIGTERM")
    assert left.value.code == (0 if child else TERMINATED)


def test_a_data_worker_that_died_is_told_with_what_helps(tmp_path: Path) -> None:
    text = "DataLoader worker (pid 7) is killed by signal: Killed."
    with (
        pytest.raises(LeaveError, match=r"run\.workers=0.* resumes from") as left,
        ending(rank(0, LightningEnvironment()), tmp_path),
    ):
        raise RuntimeError(text)
    assert left.value.code == 1
    with pytest.raises(RuntimeError, match="shapes"), ending(rank(0, None), tmp_path):
        raise RuntimeError("shapes")


def test_lightning_adds_no_callback_of_its_own(tmp_path: Path) -> None:
    recipe = load_recipe(["recipe=lora", "tracker=none"])
    trainer = make_trainer(recipe, tmp_path, torch.device("cpu"), mixed=None, callbacks=[])
    own = (Checkpoint, ModelSummary, ProgressBar)
    assert not [each for each in trainer.callbacks if isinstance(each, own)]


@dataclass
class Counted:
    frames: tuple[int, ...]

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("frames", "what"), [((1,), "images"), ((4,), "clips"), ((4, 1), "samples")]
)
def test_what_is_measured_of_a_run(frames: tuple[int, ...], what: str) -> None:
    recipe = load_recipe(["recipe=lora", "run.batch_size=4", "run.accumulate=2"])
    data: Any = Counted(frames)
    found = measured_of(recipe, data, None)
    assert (found.samples, found.what, found.count) == (8, what, 3)


@pytest.mark.parametrize(
    ("words", "strategy"),
    [
        ((), SingleDeviceStrategy),
        (("run.devices=2",), DDPStrategy),
        (("run.nodes=2",), DDPStrategy),
    ],
)
def test_several_processes_train_in_parallel(
    words: tuple[str, ...], strategy: type, tmp_path: Path
) -> None:
    recipe = load_recipe(["recipe=lora", "tracker=none", *words])
    trainer = make_trainer(recipe, tmp_path, torch.device("cpu"), mixed=None, callbacks=[])
    assert type(trainer.strategy) is strategy
