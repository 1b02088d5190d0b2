"""One tiny denoiser of the corpus: its configuration and seeded inputs of its forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Draw:
    """Normal numbers and integers from one seeded generator, so that inputs repeat."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def below(self, high: int, *shape: int) -> Tensor:
        """Integers from 0 to `high` - 1."""
        return torch.randint(high, shape, generator=self.generator)


@dataclass(frozen=True)
class Case:
    """The class `name` of diffusers, built with `config`; `draw` makes its inputs. Layers whose
    name contains `idle` are built, but its forward never runs them."""

    name: str
    config: dict[str, Any]
    draw: Callable[[Draw], dict[str, Any]]
    idle: str | None = None

    def inputs(self) -> dict[str, Any]:
        """Fresh keyword arguments of forward, the same at each call."""
        return self.draw(Draw(1))


def case(
    name: str, draw: Callable[[Draw], dict[str, Any]], *, idle: str | None = None, **config: Any
) -> Case:
    return Case(name, config, draw, idle)


def give(**inputs: Any) -> dict[str, Any]:
    return inputs


def mask(length: int, off: int = 2) -> Tensor:
    """(2, length): the first sample lacks its last `off` tokens."""
    kept = torch.ones(2, length, dtype=torch.long)
    kept[0, length - off :] = 0
    return kept


def grid(*sizes: int) -> Tensor:
    """(product of sizes, number of sizes): the coordinates of each token, as floats."""
    axes = [torch.arange(size, dtype=torch.float32) for size in sizes]
    return torch.cartesian_prod(*axes).reshape(-1, len(sizes))


def times(*values: float) -> Tensor:
    return torch.tensor(values or (0.3, 0.7), dtype=torch.float32)
