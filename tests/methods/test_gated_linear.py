"""Gated linear attention in a denoiser: the gates, the scans, the start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import methods
from trainer.attention.kernels.gated import ORDERS, recurrent
from trainer.attention.scanned import OPEN
from trainer.recipe import methods_of

Predict = Callable[[Any], Tensor]


def add(backbone: Any, **options: Any) -> methods.Plan:
    return methods.apply(backbone, methods_of({"gated_linear": options}))


def ops(backbone: Any) -> list[Any]:
    return [op for p in backbone.host.processors.values() for op in p.ops]


@pytest.mark.parametrize("scans", [1, 2, 4])
def test_sites_take_turns_through_the_four_directions(scans: int, tiny: Any) -> None:
    add(tiny, scans=scans)
    found = [order for op in ops(tiny) for order in op.orders]
    assert all(len(op.orders) == scans for op in ops(tiny))
    assert found == [ORDERS[i % 4] for i in range(len(found))]


def test_the_equation(tiny: Any, predict: Predict, randomise: Callable[..., None]) -> None:
    plan = add(tiny, rank=3, tau=4.0)
    randomise(tiny, plan)
    op = next(op for op in ops(tiny) if op.orders == ("row_back",))
    seen: list[Any] = []

    def kernel(*given: Any, run: Any = op.kernel) -> Tensor:
        seen.append((op.x, *given[:3], run(*given)))
        return seen[-1][4]

    op.kernel = kernel
    predict(tiny)
    ((x, q, k, v, o),) = seen
    heads = q.shape[1]
    up, let = (x @ op.down.weight.T) @ op.up.weight.T + op.up.bias, op.let(x)
    g, let = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (up.sigmoid().log() / 4, let))
    s = recurrent(*(t.flip(2) for t in (q, k, v, g))).flip(2)
    normed = s / (s.square().mean(-1, keepdim=True) + 1e-6).sqrt() * op.norm.weight
    torch.testing.assert_close(o, F.silu(let) * normed, atol=1e-4, rtol=1e-4)


def test_the_output_gate_is_open_at_the_start(tiny: Any) -> None:
    assert float(F.silu(torch.tensor(OPEN))) == pytest.approx(1, abs=1e-6)
    add(tiny)
    assert all(not op.let.weight.any() for op in ops(tiny))


def test_all_of_it_trains(tiny: Any, predict: Predict) -> None:
    plan = add(tiny, scans=2)
    predict(tiny).square().sum().backward()
    parameters = dict(tiny.named_parameters())
    assert plan.names and all(".gated_linear." in name for name in plan.names)
    for name in plan.names:
        grad = parameters[name].grad
        assert grad is not None and bool(grad.any()) and bool(grad.isfinite().all()), name


def test_a_token_is_scanned_after_those_before_it(tiny: Any) -> None:
    """One scan from the first row on: what a token says does not reach those before it."""
    add(tiny)
    op = next(op for op in ops(tiny) if op.orders == ("row",))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 4, generator=generator) for _ in range(3))
    g = torch.full_like(q, -0.1)
    v.requires_grad_()
    o = op.scan(q, k, v, g, "row", (3, 4))
    (grad,) = torch.autograd.grad(o[:, :, 5].sum(), v)
    assert grad.abs().sum((0, 1, 3)).nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_keys_of_others_are_refused(tiny: Any, predict: Predict) -> None:
    add(tiny, sites="cross")
    with pytest.raises(ValueError, match=r"methods\.gated_linear needs the tokens of .* choose"):
        predict(tiny)
