"""What goes into layers over several forwards, summed token by token, and its main directions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainer.ops.adapters.input_moments import input_moments, leading


def test_moments_are_summed_over_every_token_of_every_forward() -> None:
    layers = {"a": nn.Linear(3, 2), "b": nn.Linear(2, 4)}
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 5, 3, generator=generator) for _ in range(3)]

    def run() -> None:
        for batch in batches:
            layers["b"](layers["a"](batch))

    found = input_moments(layers, run)
    for name, width, reached in (
        ("a", 3, batches),
        ("b", 2, [layers["a"](batch).detach() for batch in batches]),
    ):
        wanted = torch.zeros(width, width, dtype=torch.float64)
        for batch in reached:
            for token in batch.flatten(0, 1).double():
                wanted += torch.outer(token, token)
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], wanted)
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_a_layer_that_nothing_reaches_is_an_error() -> None:
    layers = {"a": nn.Linear(3, 2), "b": nn.Linear(2, 4)}
    with pytest.raises(ValueError, match="no input reached b, 1 such layers in all"):
        input_moments(layers, lambda: layers["a"](torch.ones(1, 3)))


def test_leading_directions_come_by_their_energy_and_point_one_way() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
    energies = torch.tensor([4.0, 9.0, 1.0, 0.5, 16.0], dtype=torch.float64)
    rows = leading(basis @ torch.diag(energies) @ basis.T, 3)
    for row, column in zip(rows, (4, 1, 0), strict=True):
        wanted = basis[:, column]
        sign = 1 if wanted[wanted.abs().argmax()] > 0 else -1
        torch.testing.assert_close(row, sign * wanted)
