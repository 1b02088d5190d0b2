"""MapStore against maps computed by hand, and its limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.attention.call import SiteCall
from trainer.attention.context import StepContext, use
from trainer.attention.host import Host
from trainer.attention.op import Traits
from trainer.attention.rows import Rows
from trainer.attention.sites import require
from trainer.kernels.softmax import attention_probs, attention_scores
from trainer.ops.attention_maps import MapStore

Run = Callable[..., Tensor]


class Grab:
    """Recomputes the probabilities of a site from its q, k and mask."""

    name = "grab"
    traits = Traits()

    def __init__(self) -> None:
        self.probs_of: dict[str, Tensor] = {}

    def mask(self, mask: Tensor | None, q: Tensor, k: Tensor, call: SiteCall) -> Tensor | None:
        self.probs_of[call.site.name] = attention_probs(attention_scores(q, k), mask).detach()
        return mask


def at_step(step: int) -> StepContext:
    return StepContext(step, 3, torch.tensor([7, 3]))


@pytest.mark.parametrize("tokens", [[1, 4], [[1, 4], [0, 2]]])
def test_average_is_the_mean_of_the_resized_columns(
    tiny_unet: nn.Module, run_unet: Run, tokens: Any
) -> None:
    host = Host.attach(tiny_unet)
    sites = require(host.sites, "cross", "test")
    store, grab = MapStore(tokens), Grab()
    host.install(grab, sites)
    host.install(store, sites)
    per_row = torch.tensor(tokens).expand(2, -1)
    expected = []
    for step in range(2):
        with use(at_step(step)), torch.no_grad():
            run_unet(tiny_unet, seed=step)
        for site in sites:
            probs = grab.probs_of[site.name].mean(1)  # b n m
            side = 8 // (site.divisor or 1)
            maps = torch.stack([probs[b][:, per_row[b]].T.reshape(2, side, side) for b in range(2)])
            stored = store.maps[step, site.name]
            torch.testing.assert_close(stored, maps)
            expected.append(F.interpolate(maps, (6, 6), mode="bilinear", align_corners=False))
    assert len(store.maps) == 2 * len(sites)
    average = store.average((6, 6))
    assert average.shape == (2, 2, 6, 6)
    torch.testing.assert_close(average, torch.stack(expected).mean(0))


def test_a_group_keeps_the_maps_of_its_rows_alone(tiny_unet: nn.Module, run_unet: Run) -> None:
    """A call without the group, at the same step, leaves its maps alone."""
    host = Host.attach(tiny_unet)
    sites = require(host.sites, "cross", "test")
    every, own = MapStore([1]), MapStore([[1]], group="target/cond")
    own.name = "own"  # type: ignore[misc]
    for store in (every, own):
        host.install(store, sites)
    both = Rows.of(("target/uncond", "target/cond"), 1)
    for groups in (both, Rows.of(("target/uncond",), 2)):
        with use(StepContext(0, 1, torch.tensor([7, 3]), groups=groups)), torch.no_grad():
            run_unet(tiny_unet, seed=len(groups.groups))
        if groups is both:
            wanted = {key: maps[1:] for key, maps in every.maps.items()}
    assert wanted and own.maps.keys() == wanted.keys()
    for key, maps in wanted.items():
        assert torch.equal(own.maps[key], maps)


def test_maps_are_detached_and_cleared(tiny_unet: nn.Module, run_unet: Run) -> None:
    host = Host.attach(tiny_unet)
    store = MapStore([1])
    host.install(store, require(host.sites, "cross", "test"))
    output = run_unet(tiny_unet)
    assert output.requires_grad
    assert store.maps
    assert not any(maps.requires_grad for maps in store.maps.values())
    store.clear()
    with pytest.raises(ValueError, match="holds no maps"):
        store.average((4, 4))


def test_large_sites_keep_the_fused_kernel(tiny_unet: nn.Module, run_unet: Run) -> None:
    expected = run_unet(tiny_unet)
    host = Host.attach(tiny_unet)
    cross = require(host.sites, "cross", "test")
    store = MapStore([1], max_queries=16)
    host.install(store, [site for site in cross if site.divisor == 1])
    assert torch.equal(run_unet(tiny_unet), expected)
    assert not store.maps
    host.remove(store)
    host.install(store, cross)
    run_unet(tiny_unet)
    assert {name for _, name in store.maps} == {s.name for s in cross if s.divisor == 2}


def test_default_limit_is_32_by_32() -> None:
    call: Any = None
    store = MapStore([0])
    assert store.gate(torch.empty(1, 1, 1024, 1), call)
    assert not store.gate(torch.empty(1, 1, 1025, 1), call)


def test_oblong_latent_needs_and_uses_its_size(tiny_unet: nn.Module) -> None:
    host = Host.attach(tiny_unet)
    store = MapStore([2])
    host.install(store, require(host.sites, "cross & /2", "test"))
    model: Any = tiny_unet
    with torch.no_grad():
        model(torch.randn(1, 4, 6, 10), 3, torch.randn(1, 5, 12))
    assert {maps.shape for maps in store.maps.values()} == {(1, 1, 3, 5)}


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([5], "token 5 is outside a context of 5"), ([[0], [1], [2]], "tokens for 3 batch rows")],
)
def test_wrong_tokens_are_refused(
    tiny_unet: nn.Module, run_unet: Run, tokens: Any, message: str
) -> None:
    host = Host.attach(tiny_unet)
    host.install(MapStore(tokens), require(host.sites, "cross", "test"))
    with pytest.raises(ValueError, match=message):
        run_unet(tiny_unet)


def test_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="needs token positions"):
        MapStore([])
