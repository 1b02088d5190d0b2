"""Values between two ends: shares, and points on the arc between two noises."""

from __future__ import annotations

import torch
from torch import Tensor


def beta_shares(count: int, concentration: float) -> list[float]:
    """`count` shares from 0 to 1 of equal probability under Beta(c, c): quantile i / (count - 1).

    c = 1 gives equal distances; a larger c puts more of them in the middle, where pictures change
    fastest (AID, arXiv 2403.17924, section 4.4). By the trapezoid rule over 4,096 parts; the first
    and the last are 0 and 1 themselves, where rounding would stop short of an end with little mass.
    """
    if count < 2:
        return [0.0] * count
    x = torch.linspace(0, 1, 4097, dtype=torch.float64)
    density = (x * (1 - x)).clamp_min(0) ** (concentration - 1)
    if concentration < 1:
        density[[0, -1]] = density[[1, -2]]
    mass = torch.cumulative_trapezoid(density, x)
    mass = torch.cat([mass.new_zeros(1), mass]) / mass[-1]
    found = [0.0]
    for wanted in torch.linspace(0, 1, count, dtype=torch.float64).tolist()[1:-1]:
        at = int(torch.searchsorted(mass, wanted).clamp(1, len(mass) - 1))
        low, high = float(mass[at - 1]), float(mass[at])
        part = 0.0 if high == low else (wanted - low) / (high - low)
        found.append(float(x[at - 1]) + part * float(x[at] - x[at - 1]))
    return [*found, 1.0]


def slerp(one: Tensor, other: Tensor, share: float) -> Tensor:
    """The point at a share of the arc from one to other (c, h, w), as vectors; of parallel ones on
    the line between them."""
    a, b = one.flatten().double(), other.flatten().double()
    cosine = (a @ b / (a.norm() * b.norm()).clamp_min(1e-12)).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if float(angle.sin()) < 1e-6:
        return one + share * (other - one)
    weights = ((1 - share) * angle).sin() / angle.sin(), (share * angle).sin() / angle.sin()
    return one * float(weights[0]) + other * float(weights[1])
