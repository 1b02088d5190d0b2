"""Statistics of the inputs of chosen layers over a few forward passes, for initial values that
depend on the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.ops.exact import in_float64


def input_moments(layers: Mapping[str, nn.Module], run: Callable[[], None]) -> dict[str, Tensor]:
    """H = sum of x x^T over all tokens x (d,) that reach each layer while `run` runs: (d, d) in
    float64.

    Raises:
        ValueError: a layer that nothing reached.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(layer: nn.Module, args: tuple[Any, ...]) -> None:
            tokens = in_float64(args[0].detach().flatten(0, -2))
            moment = tokens.T @ tokens
            found[name] = found[name] + moment if name in found else moment

        return add

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if missed := [name for name in layers if name not in found]:
        raise ValueError(f"no input reached {missed[0]}, {len(missed)} such layers in all")
    return found


def leading(moment: Tensor, rank: int) -> Tensor:
    """The `rank` directions (rank, d) of largest energy, as unit rows; signs fixed so that the
    largest entry is positive."""
    _, vectors = torch.linalg.eigh(moment)
    rows = vectors.T.flip(0)[:rank]
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * largest.sign()
