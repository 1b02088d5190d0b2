"""Extra inputs of samples: stacked by name, moved with their batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.data.loader import Fixed, Planned
from trainer.data.plan import StepPlan
from trainer.data.source import Sample


class Depths:
    """Pictures of one value, each with a depth map and a vector."""

    groups, shares, weights = [range(4)], [1.0], [1.0]
    frames: Sequence[int] = [1]
    rates: Sequence[float] = ()
    fixed = True
    skipped: Sequence[str] = ()

    def __len__(self) -> int:
        return 4

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        given = {"depth": torch.full((1, 4, 4), index / 4), "pose": torch.arange(3) + index}
        return Sample(self.image(index), "a fox", str(index), inputs=given)

    def image(self, index: int) -> Tensor:
        return torch.full((3, 8, 8), index / 4)

    def caption(self, index: int, rng: np.random.Generator) -> str:
        return "a fox"

    def fingerprint(self) -> str:
        return "depths"


def test_they_stand_in_the_order_of_the_samples() -> None:
    batch = Planned(Depths(), StepPlan(((0, 4),), (1.0,), (1.0,), 3, 0), None, 0, 1)[0]
    indices = [int(key) for key in batch.keys]
    assert batch.inputs["depth"].shape == (3, 1, 4, 4)
    assert batch.inputs["depth"][:, 0, 0, 0].tolist() == [index / 4 for index in indices]
    assert batch.inputs["pose"].tolist() == [[index, index + 1, index + 2] for index in indices]
    held_out = Fixed(Depths(), 2, None)[1]
    assert held_out.inputs["depth"][:, 0, 0, 0].tolist() == [0.5, 0.75]


def test_they_move_with_the_batch() -> None:
    batch = Planned(Depths(), StepPlan(((0, 4),), (1.0,), (1.0,), 2, 0), None, 0, 1)[0]
    moved = batch.to(torch.device("meta"))
    assert {value.device.type for value in moved.inputs.values()} == {"meta"}
    assert moved.pixels is not None and moved.pixels.device.type == "meta"


def test_samples_with_unlike_inputs_are_refused() -> None:
    class Lacking(Depths):
        def sample(self, index: int, rng: np.random.Generator) -> Sample:
            found: Any = super().sample(index, rng).inputs
            kept = {name: value for name, value in found.items() if name == "pose" or index < 2}
            return Sample(self.image(index), "a fox", str(index), inputs=kept)

    items = Fixed(Lacking(), 4, None)
    with pytest.raises(ValueError, match=r"0 has the extra inputs \['depth', 'pose'\] and 2 "):
        items[0]
