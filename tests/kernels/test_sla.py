"""Sparse-linear attention against the equations with complete maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.kernels.sla import Shares, sparse_and_linear


def by_loops(
    q: Tensor, k: Tensor, v: Tensor, shares: Shares, scale: float
) -> tuple[Tensor, Tensor]:
    """Of one head, block of queries after block of queries; q, k, v (n, d)."""
    n, size = len(q), shares.size
    parts = [range(start, min(start + size, n)) for start in range(0, n, size)]
    critical, negligible = shares.counts(len(parts))
    keys = torch.stack([k[list(part)].mean(0) for part in parts])
    exact, linear = torch.zeros_like(q), torch.zeros_like(q)
    for part in parts:
        p = (keys @ q[list(part)].mean(0) * scale).softmax(0)
        order = sorted(range(len(parts)), key=lambda j: -float(p[j]))
        seen = [j for block in order[:critical] for j in parts[block]]
        rest = [j for block in order[critical : len(parts) - negligible] for j in parts[block]]
        phi_k = k[rest].softmax(-1)
        for i in part:
            exact[i] = (k[seen] @ q[i] * scale).softmax(0) @ v[seen]
            weights = phi_k @ q[i].softmax(-1)
            linear[i] = (weights @ v[rest]) / (weights.sum() + 1e-5)
    return exact, linear


@pytest.mark.parametrize("tokens", [24, 22])
@pytest.mark.parametrize(("critical", "negligible"), [(0.34, 0.2), (0.01, 0.0), (0.5, 0.4)])
def test_both_parts_are_those_of_loops(tokens: int, critical: float, negligible: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 2, 2, tokens, 5)
    q, k, v = (x.requires_grad_() for x in torch.randn(shape, generator=generator).double())
    shares = Shares(4, critical, negligible)
    own = sparse_and_linear(q, k, v, shares=shares, scale=0.7)
    heads = [by_loops(q[b, h], k[b, h], v[b, h], shares, 0.7) for b in range(2) for h in range(2)]
    wanted = [torch.stack(part).view(own[0].shape) for part in zip(*heads, strict=True)]
    for mine, other in zip(own, wanted, strict=True):
        torch.testing.assert_close(mine, other)
    slopes = [torch.randn(own[0].shape, generator=generator).double() for _ in range(2)]
    found = [
        torch.autograd.grad(
            sum((o * s).sum() for o, s in zip(pair, slopes, strict=True)), (q, k, v)
        )
        for pair in (own, wanted)
    ]
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


def test_counts_of_blocks() -> None:
    assert Shares(64, 0.05, 0.1).counts(256) == (13, 25)
    assert Shares(8, 0.01, 0.9).counts(8) == (1, 7)
    assert Shares(8, 0.5, 0.9).counts(1) == (1, 0)
