"""The loss by timestep, against plain means."""

from __future__ import annotations

import pytest
import torch

from trainer.training.loss_bins import LossBins
from trainer.training.module import QUANTILES


def test_each_loss_is_in_the_eighth_of_its_timestep() -> None:
    bins = LossBins()
    bins.add(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 0.124, 0.125]))
    bins.add(torch.tensor([7.0, float("nan"), 9.0]), torch.tensor([0.999, 0.3, 1.0]))
    assert bins.take() == {"train/loss_t062": 2.0, "train/loss_t188": 5.0, "train/loss_t938": 8.0}
    assert bins.take() == {}  # since the last time there was nothing
    bins.add(torch.tensor([2.0]), torch.tensor([0.5]))
    assert bins.take() == {"train/loss_t562": 2.0}


def test_the_names_are_those_of_validation() -> None:
    bins = LossBins()
    bins.add(torch.ones(8), torch.tensor(QUANTILES))
    assert list(bins.take()) == [f"train/loss_t{round(1000 * level):03d}" for level in QUANTILES]


def test_no_gradient_is_kept() -> None:
    bins = LossBins()
    losses = torch.ones(2, requires_grad=True) * 2
    bins.add(losses, torch.tensor([0.1, 0.9]))
    assert not bins.batches[0][0].requires_grad  # nor what made it
    assert sum(bins.take().values()) == pytest.approx(4.0)
