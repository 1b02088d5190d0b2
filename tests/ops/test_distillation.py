"""Distillation: a term for each site, relative to what the site put out before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from denoisers import traits_of
from torch import Tensor, nn

from trainer.attention.call import SiteCall
from trainer.attention.host import Host
from trainer.attention.op import Traits
from trainer.ops.distillation import Distillation, Original
from trainer.ops.linear_attention import LinearAttentionOp


class Nudge:
    """Adds to what a site puts out."""

    name = "nudge"
    traits = Traits()

    def __init__(self, by: float) -> None:
        self.by = by

    def restore(self, y: Tensor, call: SiteCall) -> Tensor:
        return y + self.by


def test_nothing_to_learn_where_nothing_changed(backbone: tuple[nn.Module, Any]) -> None:
    model, call = backbone
    host = Host.attach(model, traits_of(model))
    sites = [site for site in host.sites if site.kind == "self"]
    distillation = Distillation(2.0, 1.0)
    assert float(distillation.loss(None)) == 0
    for site in sites:
        host.install(Original(site, distillation), [site])
    call(model)
    assert set(distillation.terms) == {site.name for site in sites}
    assert float(distillation.loss(None).detach()) < 1e-10


def test_it_is_the_relative_error_of_outputs(tiny_unet: nn.Module, run_unet: Any) -> None:
    host = Host.attach(tiny_unet)
    sites = [site for site in host.sites if site.kind == "self"][:2]
    distillation = Distillation(3.0, 1.0)
    seen: list[Tensor] = []

    class Look:
        name = "look"
        traits = Traits()

        def restore(self, y: Tensor, call: SiteCall) -> Tensor:
            seen.append(y.detach())
            return y

    for site in sites:
        host.install(Original(site, distillation), [site])
        host.install(Nudge(0.25), [site])
        host.install(Look(), [site])
    run_unet(tiny_unet)
    wanted = [0.25**2 / y.square().mean() for y in seen]
    torch.testing.assert_close(
        distillation.loss(None).detach(), 3 * torch.stack(wanted).mean(), rtol=1e-4, atol=0
    )


def test_only_in_training_and_only_until_its_time(tiny_unet: nn.Module, run_unet: Any) -> None:
    host = Host.attach(tiny_unet)
    site = host.sites[0]
    distillation = Distillation(1.0, 0.5)
    original = Original(site, distillation)
    host.install(original, [site])
    host.install(Nudge(1.0), [site])
    with torch.no_grad():
        run_unet(tiny_unet)
    assert not distillation.terms
    original.eval()
    run_unet(tiny_unet)
    assert not distillation.terms
    original.train()
    distillation.schedule(0.5)
    run_unet(tiny_unet)
    assert not distillation.terms and float(distillation.loss(None)) == 0
    distillation.schedule(0.49)
    run_unet(tiny_unet)
    assert float(distillation.loss(None).detach()) > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_reaches_the_projections(
    tiny_unet: Any, run_unet: Any, checkpointing: bool
) -> None:
    host = Host.attach(tiny_unet)
    site = next(site for site in host.sites if site.kind == "self")
    distillation = Distillation(1.0, 1.0)
    host.install(LinearAttentionOp(site, "relu"), [site])
    host.install(Original(site, distillation), [site])
    tiny_unet.train()
    found = []
    for on in (False, checkpointing):
        if on:
            tiny_unet.enable_gradient_checkpointing()
        tiny_unet.zero_grad()
        run_unet(tiny_unet)
        distillation.loss(None).backward()
        assert not distillation.terms
        found.append([site.projection(role).weight.grad.clone() for role in ("q", "k", "v", "out")])
    assert all(bool(grad.any()) for grad in found[0])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other)
