"""Kernels at a site take the scale of its scores from the layer, where it need not be d^-0.5, and
masks that other methods have made."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.call import SiteCall
from trainer.attention.context import StepContext
from trainer.config.load import methods_of
from trainer.methods.apply import apply_methods

# options under which each is softmax attention over all tokens
KERNELS: dict[str, dict[str, Any]] = {
    "flash": {"backend": "math"},
    "flashmask": {"size": 1.0},
    "longlora": {"rank": 2, "group": 1},
    "tiled": {"rows": 16, "columns": 24},
}


def by_a_loop(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """softmax(scale q k^T + mask) v, query by query."""
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                scores = k[b, h] @ q[b, h, i] * scale
                if mask is not None:
                    scores = scores + mask[b, 0, i]
                rows.append(scores.softmax(0) @ v[b, h])
    return torch.stack(rows).view(q.shape)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_takes_scale_and_mask(
    name: str, scale: float | None, masked: bool, tiny: Any
) -> None:
    apply_methods(tiny, methods_of({name: KERNELS[name], "new_token": {}}))
    site = next(site for site in tiny.sites if site.kind == "self" and site.divisor == 2)
    (op,) = tiny.host.processors[site.name].ops
    generator = torch.Generator().manual_seed(0)
    shape = (2, site.heads, 16, site.head_dim)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    mask = torch.randn(2, 1, 16, 16, generator=generator) if masked else None
    if scale is not None:
        site.module.scale_qk, site.module.scale = False, scale
    s = site.head_dim**-0.5 if scale is None else scale
    for training in (True, False):
        tiny.train(training)
        o = op.kernel(
            q,
            k,
            v,
            mask=mask,
            call=SiteCall(site, StepContext(0, 1, torch.tensor(0), latent_size=(8, 8))),
        )
        torch.testing.assert_close(o, by_a_loop(q, k, v, s, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [None, 0.2])
def test_the_groups_of_longlora_take_the_scale_too(scale: float | None, tiny: Any) -> None:
    """Two heads of 16 tokens in groups of 4, those of the second begin 2 later; in training."""
    apply_methods(tiny, methods_of({"longlora": {"rank": 2, "group": 4}}))
    site = next(site for site in tiny.sites if site.kind == "self" and site.divisor == 2)
    (op,) = tiny.host.processors[site.name].ops
    if scale is not None:
        site.module.scale_qk, site.module.scale = False, scale
    s = site.head_dim**-0.5 if scale is None else scale
    tiny.train()
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, 16, site.head_dim)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    o = op.kernel(
        q,
        k,
        v,
        mask=None,
        call=SiteCall(site, StepContext(0, 1, torch.tensor(0), latent_size=(8, 8))),
    )
    for head, edges in enumerate(([0, 4, 8, 12, 16], [0, 2, 6, 10, 14, 16])):
        for start, stop in pairwise(edges):
            part = [x[:, head : head + 1, start:stop] for x in (q, k, v)]
            wanted = by_a_loop(part[0], part[1], part[2], s, None)
            torch.testing.assert_close(
                o[:, head : head + 1, start:stop], wanted, rtol=1e-4, atol=1e-5
            )
