"""A loss or a gradient that is no number never reaches a weight."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from trainer.config.load import load_recipe
from trainer.training import checkpoint_files as checkpoint
from trainer.training.checkpoint_files import read_checkpoint
from trainer.training.module import DiffusionModule

pytestmark = pytest.mark.faults


def finite(tensors: Any) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in tensors.values())


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_by_default_the_run_ends_and_names_the_samples(
    kind: str, tmp_path: Path, run: Any, fault: Any, look: Any
) -> None:
    with fault(**{kind: {"step": 2}}):
        assert run(tmp_path / "run") == 70
    assert [each.step for each in look.checkpoints(tmp_path / "run")] == [1, 2]
    (event,) = look.events(tmp_path / "run", "nonfinite")
    assert event["step"] == 2 and len(event["batches"][0]["keys"]) == 2
    assert run(tmp_path / "run") == 0  # without the fault it goes on


def test_a_step_left_out_changes_nothing(tmp_path: Path, run: Any, fault: Any, look: Any) -> None:
    """Neither weights nor moments, decay of weights included; the lr and the data go on."""
    with fault(nan={"step": 2}, inf={"step": 3}):
        assert run(tmp_path / "run", "run.on_nonfinite=skip", "optim.ema=null") == 0
    two, *later = look.checkpoints(tmp_path / "run")[1:]
    for each in later[:2]:
        (weights, state), (others, other) = read_checkpoint(two), read_checkpoint(each)
        assert look.same(weights, others)
        assert look.same(state["optimizer"]["state"], other["optimizer"]["state"])
    assert look.differing(two, later[-1])
    assert finite(load_file(tmp_path / "run" / "adapter.safetensors"))
    assert [event["step"] for event in look.events(tmp_path / "run", "nonfinite")] == [2, 3]


def test_only_the_micro_batch_at_fault_is_named(
    tmp_path: Path, run: Any, look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DiffusionModule.training_step

    def second_of_two(self: Any, batch: Any, index: int) -> Any:
        return original(self, batch, index) * (float("nan") if batch.step == 3 else 1)

    monkeypatch.setattr(DiffusionModule, "training_step", second_of_two)
    assert run(tmp_path / "run", "run.accumulate=2") == 70
    (event,) = look.events(tmp_path / "run", "nonfinite")
    assert [batch["micro_step"] for batch in event["batches"]] == [3]


def test_the_budget_ends_it(tmp_path: Path, run: Any, fault: Any, look: Any) -> None:
    own = ("run.on_nonfinite=skip", "run.nonfinite_in_a_row=2")
    with fault(nan={"step": 1, "last": 4}):
        assert run(tmp_path / "row", *own) == 70
        assert run(tmp_path / "total", "run.on_nonfinite=skip", "run.nonfinite_total=1") == 70
    assert len(look.events(tmp_path / "row", "nonfinite")) == 3
    assert len(look.events(tmp_path / "total", "nonfinite")) == 2


def test_the_budget_outlives_a_restart(tmp_path: Path, run: Any, fault: Any) -> None:
    own = ("run.on_nonfinite=skip", "run.nonfinite_total=1")
    with fault(nan={"step": 0}, signals={"numbers": [signal.SIGTERM], "step": 1}):
        assert run(tmp_path / "run", *own) == 143
    with fault(nan={"step": 3}):
        assert run(tmp_path / "run", *own) == 70


def test_back_to_the_last_checkpoint(tmp_path: Path, run: Any, fault: Any, look: Any) -> None:
    """Saved after step 2, left out in the fourth: the third is undone, the fifth is trained."""
    own = ("run.on_nonfinite=rollback", "run.checkpoint_every=2", "optim.ema=null")
    with fault(nan={"step": 3}):
        assert run(tmp_path / "run", *own) == 0
    two, four, five = look.checkpoints(tmp_path / "run")
    (weights, state), (others, other) = read_checkpoint(two), read_checkpoint(four)
    assert look.same(weights, others)
    assert look.same(state["optimizer"]["state"], other["optimizer"]["state"])
    assert other["schedule"]["last_epoch"] == 4  # the lr did not go back
    assert four.micro_step == 4 and look.differing(four, five)


def test_back_without_a_checkpoint_ends_it(
    tmp_path: Path, run: Any, fault: Any, words: Any
) -> None:
    own = ("run.on_nonfinite=rollback", "run.checkpoint_every=2")
    with fault(nan={"step": 1}):
        assert run(tmp_path / "run", *own) == 70
    with pytest.raises(ValueError, match=r"goes back to a checkpoint; set run\.checkpoint_"):
        load_recipe(words("run.on_nonfinite=rollback", "run.checkpoint_every=0"))


def test_a_weight_that_blew_up_is_not_saved(
    tmp_path: Path, run: Any, look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the optimiser itself, behind the last look at gradients."""
    original = torch.optim.AdamW.step

    def step(self: Any, *arguments: Any, **options: Any) -> Any:
        result = original(self, *arguments, **options)
        value = self.param_groups[0]["params"][0]
        if self.state[value]["step"] == 3:
            value.data.view(-1)[0] = float("inf")
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert run(tmp_path / "run") == 70
    made = look.checkpoints(tmp_path / "run")
    assert [each.step for each in made] == [1, 2]
    assert all(finite(load_file(each.folder / checkpoint.WEIGHTS)) for each in made)


@pytest.mark.parametrize("cached", ["true", "false"])
def test_samples_are_named_by_their_files(
    cached: str, tmp_path: Path, run: Any, fault: Any, look: Any
) -> None:
    """With their latents in the cache, too, where no picture is read."""
    photos = tmp_path / "dog"
    photos.mkdir()
    for number in range(3):
        Image.effect_noise((32, 32), 40 + number).convert("RGB").save(photos / f"IMG_{number}.png")
    own = (f"data.concept={photos}", f"run.cache_latents={cached}")
    with fault(nan={"step": 0}):
        assert run(tmp_path / "run", *own) == 70
    (event,) = look.events(tmp_path / "run", "nonfinite")
    keys = event["batches"][0]["keys"]
    assert len(keys) == 2 and set(keys) < {f"IMG_{number}.png" for number in range(3)}
