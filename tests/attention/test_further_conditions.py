"""Conditions that methods own by name: encoded, dropped, told to groups of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.condition import Condition
from trainer.attention.errors import TakenError
from trainer.attention.further_conditions import (
    FurtherCondition,
    register_condition,
    told_further,
    told_groups,
)


@dataclass
class Model:
    denoiser_name: str = "unet"
    further_conditions: dict[str, FurtherCondition] = field(default_factory=dict)


def encode(model: Any, inputs: Mapping[str, Tensor], present: Tensor) -> dict[str, Tensor]:
    return {"shown": torch.where(present[:, None], inputs["reference"], -1.0)}


def model_with_one() -> Model:
    model = Model()
    register_condition(model, FurtherCondition("shown", "a", ("reference", "mask"), encode))
    return model


def test_a_name_has_one_owner() -> None:
    model = model_with_one()
    with pytest.raises(TakenError, match=r"the condition of unet.shown belongs to methods.a"):
        register_condition(model, FurtherCondition("shown", "b", ("reference",), encode))


def test_without_its_first_input_there_is_no_condition() -> None:
    given = Condition(torch.ones(2, 3, 4))
    inputs = {"mask": torch.ones(2, 1)}
    assert (
        told_further(model_with_one(), given, inputs, present=lambda own: torch.ones(2) > 0)
        is given
    )
    assert told_groups(model_with_one(), given, inputs, sees=(False, True)) is given


def test_samples_that_drop_it_are_told_of_none() -> None:
    inputs = {"reference": torch.arange(6.0).view(3, 2)}
    kept = torch.tensor([True, False, True])
    found = told_further(model_with_one(), Condition(), inputs, present=lambda own: kept)
    assert found.further["shown"].tolist() == [[0, 1], [-1, -1], [4, 5]]


def test_groups_that_do_not_see_it_are_told_of_none() -> None:
    inputs = {"reference": torch.arange(4.0).view(2, 2)}
    found = told_groups(model_with_one(), Condition(), inputs, sees=(False, True, True))
    assert found.further["shown"].tolist() == [[-1, -1], [-1, -1], *([[0, 1], [2, 3]] * 2)]


def test_it_follows_the_rows_of_a_condition() -> None:
    given = Condition(torch.ones(2, 3, 4), further={"shown": torch.arange(4.0).view(2, 2)})
    frames = given.per_frame(2)
    assert frames.further["shown"].tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert torch.equal(frames.per_clip(2).further["shown"], given.further["shown"])
    assert given.rows(slice(1, 2)).further["shown"].tolist() == [[2, 3]]
    assert "further" not in given.tensors()
