"""SOFT in a denoiser: what a site computes, how many landmarks each has, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.attention.call import SiteCall
from trainer.attention.context import StepContext
from trainer.config.load import methods_of
from trainer.methods.apply import Plan, apply_methods

Predict = Callable[[Any], Tensor]


def add(backbone: Any, **options: Any) -> Plan:
    train = {"selective": {"sites": "self", "projections": ["q", "k", "v", "out"]}}
    return apply_methods(backbone, methods_of({"soft": options, **train}))


def ops(backbone: Any) -> dict[str, Any]:
    return {
        name: op
        for name, processor in backbone.host.processors.items()
        for op in processor.ops
        if op.name == "soft"
    }


def kernel(a: Tensor, b: Tensor) -> Tensor:
    return torch.exp(-(a[:, None] - b[None]).square().sum(-1) / 2)


@pytest.mark.parametrize("ratio", [1, 2])
def test_a_site_against_the_equation_written_out(
    ratio: int, tiny: Any, randomise: Callable[..., None]
) -> None:
    """Head by head on a grid of 5 x 4: landmarks of complete cells, the tied queries, the inverse
    by 20 iterations, the convolution over the values."""
    plan = add(tiny, sites="self & /1", ratio=ratio)
    randomise(tiny, plan, 0.3)
    site = next(site for site in tiny.sites if site.kind == "self" and site.divisor == 1)
    op = ops(tiny)[site.name]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, site.heads, 20, site.head_dim, generator=generator) for _ in range(3))
    call = SiteCall(site, StepContext(0, 1, torch.tensor(0), latent_size=(5, 4)))
    with torch.no_grad():
        o = op.kernel(q, k, v, mask=None, call=call)
        local = F.conv2d(
            v.transpose(2, 3).reshape(1, -1, 5, 4), op.shortcut.weight, op.shortcut.bias,
            padding=1, groups=site.heads * site.head_dim,
        ).reshape(site.heads, site.head_dim, 20)  # fmt: skip
        for head in range(site.heads):
            tied = (q[0, head] + k[0, head]) / 2 * site.head_dim**-0.25
            cells = []
            for y in range(0, 5 - ratio + 1, ratio):
                for x in range(0, 4 - ratio + 1, ratio):
                    cell = tied.view(5, 4, -1)[y : y + ratio, x : x + ratio]
                    cells.append(torch.einsum("yxc,ocyx->o", cell, op.landmarks.conv.weight))
            marks = F.gelu(op.landmarks.norm(torch.stack(cells)))
            if ratio == 1:
                wanted = kernel(marks, marks) @ v[0, head]
            else:
                p = kernel(marks, marks).double()
                inverse = p + 0.01 * torch.eye(len(p), dtype=p.dtype)
                inverse, p = 1.8 / p.sum(1).max() ** 2 * inverse, inverse
                for _ in range(20):
                    inverse = 2 * inverse - inverse @ p @ inverse
                to = kernel(tied, marks).double()
                wanted = (to @ inverse @ to.T @ v[0, head].double()).float()
            torch.testing.assert_close(o[0, head], wanted + local[head].T, rtol=1e-3, atol=1e-3)


def test_coarser_grids_have_the_same_number_of_landmarks(tiny: Any) -> None:
    """8, 4, 2, 1 of the paper, by how fine a site's grid is."""
    add(tiny, ratio=4)
    found = ops(tiny)
    divisors = {site.name: site.divisor for site in tiny.sites}
    assert {(divisors[name], op.ratio) for name, op in found.items()} == {(1, 4), (2, 2)}


def test_a_grid_that_is_unknown_makes_no_other_coarser(tiny: Any) -> None:
    """Of the other sites the finest has the ratio that was asked for, whatever its divisor is."""
    sites = tiny.host.sites
    own = next(site for site in sites if site.kind == "self")
    sites[:] = [replace(x, divisor=None if x is own else 2 * x.divisor) for x in sites]
    add(tiny, ratio=4)
    divisors = {site.name: site.divisor for site in tiny.sites}
    assert {(divisors[name], op.ratio) for name, op in ops(tiny).items()} == {
        (None, 4), (2, 4), (4, 2),
    }  # fmt: skip


def test_queries_and_keys_both_learn(tiny: Any, predict: Predict) -> None:
    base = predict(tiny).detach()
    plan = add(tiny, ratio=2)
    output = predict(tiny)
    assert bool(output.isfinite().all()) and not torch.equal(output, base)
    output.square().sum().backward()
    parameters = dict(tiny.named_parameters())
    for role in ("to_q", "to_k", "to_v", "soft.landmarks.conv", "soft.shortcut"):
        own = [name for name in plan.names if f".{role}." in name]
        assert own
        for name in own:
            grad = parameters[name].grad
            assert grad is not None and bool(grad.isfinite().all()) and bool(grad.any()), name


def test_it_is_tied(tiny: Any) -> None:
    """Queries and keys that change places give the same."""
    add(tiny, sites="self & /1", ratio=2)
    site = next(site for site in tiny.sites if site.kind == "self" and site.divisor == 1)
    op = ops(tiny)[site.name]
    q, k, v = (torch.randn(1, site.heads, 16, site.head_dim) for _ in range(3))
    call = SiteCall(site, StepContext(0, 1, torch.tensor(0), latent_size=(4, 4)))
    one, other = (op.kernel(*pair, v, mask=None, call=call) for pair in ((q, k), (k, q)))
    assert torch.equal(one, other)


def test_what_it_cannot_do_is_refused_by_name(tiny: Any, predict: Predict) -> None:
    with pytest.raises(ValueError, match=r"methods\.soft: .* is cross attention; soft has one"):
        add(tiny, sites="cross")
    add(tiny, ratio=16)
    with pytest.raises(ValueError, match=r"grid of 8 x 8 tokens, where 16 x 16 are to become"):
        predict(tiny)
