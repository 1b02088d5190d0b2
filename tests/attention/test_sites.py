"""Sites of real diffusers models: order, kinds, places, grids, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.attention.sites import require, scan, select

Call = Callable[[nn.Module], Tensor]


def record_order(model: nn.Module, call: Any) -> list[str]:
    """Names of classic attention layers in the order in which a forward reaches them."""
    from diffusers.models.attention_processor import Attention

    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, module in model.named_modules()
        if isinstance(module, Attention)
    ]
    with torch.no_grad():
        call(model)
    for handle in handles:
        handle.remove()
    return order


def motion_unet() -> nn.Module:
    from diffusers import UNetMotionModel

    torch.manual_seed(0)
    return UNetMotionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        cross_attention_dim=12,
        num_attention_heads=2,
        motion_num_attention_heads=2,
    ).eval()


def unet_3d() -> nn.Module:
    from diffusers import UNet3DConditionModel

    torch.manual_seed(0)
    return UNet3DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    ).eval()


def call_motion(model: nn.Module) -> Tensor:
    output: Any = model(torch.randn(1, 4, 2, 8, 8), 3, torch.randn(2, 5, 12))
    return output.sample


def call_3d(model: nn.Module) -> Tensor:
    output: Any = model(torch.randn(1, 4, 2, 8, 8), 3, torch.randn(1, 5, 12))
    return output.sample


def test_sites_are_in_forward_order(backbone: tuple[nn.Module, Call]) -> None:
    model, call = backbone
    sites = scan(model)
    assert [site.name for site in sites] == record_order(model, call)
    assert [site.depth for site in sites] == [i / (len(sites) - 1) for i in range(len(sites))]


@pytest.mark.parametrize(("make", "call"), [(motion_unet, call_motion), (unet_3d, call_3d)])
def test_video_sites_are_in_forward_order_and_temporal_by_path(make: Any, call: Any) -> None:
    model = make()
    sites = scan(model)
    assert [site.name for site in sites] == record_order(model, call)
    marks = ("motion_modules", "temp_attentions", "transformer_in")
    temporal = {site.name for site in sites if any(mark in site.name for mark in marks)}
    assert temporal
    assert {site.name for site in sites if site.kind == "temporal"} == temporal
    assert not any(site.kind == "temporal" for site in select(sites, "all | !cross | down | /1"))
    assert {site.name for site in select(sites, "temporal")} == temporal


def test_unet_sites(tiny_unet: nn.Module) -> None:
    sites = scan(tiny_unet)
    seen = [(s.name.split(".")[0], s.kind, s.place, s.divisor) for s in sites]
    assert seen[:4] == [
        ("down_blocks", "self", "down", 1),
        ("down_blocks", "cross", "down", 1),
        ("down_blocks", "self", "down", 2),
        ("down_blocks", "cross", "down", 2),
    ]
    assert seen[4:6] == [("mid_block", "self", "mid", 2), ("mid_block", "cross", "mid", 2)]
    assert {(s.name[:11], s.divisor) for s in sites if s.place == "up"} == {
        ("up_blocks.0", 2),
        ("up_blocks.1", 1),
    }
    first = sites[0]
    assert (first.heads, first.head_dim) == (8, 2)
    assert first.name == "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def test_divisor_is_the_grid_the_site_sees(backbone: tuple[nn.Module, Call]) -> None:
    model, call = backbone
    queries: dict[str, int] = {}
    for site in scan(model):
        site.projection("q").register_forward_hook(
            lambda _m, _i, out, name=site.name: queries.update({name: out.shape[1]})
        )
    with torch.no_grad():
        call(model)
    assert {s.name: (8 // s.divisor) ** 2 for s in scan(model) if s.divisor} == queries


def test_projections_are_the_layers_in_place_now(tiny_unet: nn.Module) -> None:
    site: Any = scan(tiny_unet)[1]
    assert site.projections == {
        "q": site.module.to_q,
        "k": site.module.to_k,
        "v": site.module.to_v,
        "out": site.module.to_out[0],
    }
    site.module.to_k = nn.Linear(12, 16)
    assert site.projection("k") is site.module.to_k


def test_layers_inside_a_site_are_no_sites(tiny_unet: nn.Module) -> None:
    before = [site.name for site in scan(tiny_unet)]
    inner = nn.Module()
    for role in ("to_q", "to_k", "to_v"):
        inner.add_module(role, nn.Linear(2, 2))
    scan(tiny_unet)[0].module.add_module("extra", inner)
    assert [site.name for site in scan(tiny_unet)] == before


def test_a_layer_that_makes_no_attention_call_is_refused_by_class_and_path() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k, self.to_v = (nn.Linear(2, 2) for _ in range(3))

    with pytest.raises(ValueError, match="Own at 'inner' is not hosted: it has no soft") as bad:
        scan(nn.ModuleDict({"inner": Own()}))
    assert "choose a backbone whose layers call torch's scaled_dot_product" in str(bad.value)


def test_a_softmax_by_hand_is_refused_by_class_and_path() -> None:
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k, self.to_v = (nn.Linear(2, 2) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self._mix(self.to_q(x) @ self.to_k(x).mT) @ self.to_v(x)

        def _mix(self, scores: Tensor) -> Tensor:
            return scores.softmax(dim=-1)

    with pytest.raises(ValueError, match="ByHand at 'inner' is not hosted: it has a softmax by"):
        scan(nn.ModuleDict({"inner": ByHand()}))


def test_require_says_who_asked_and_what_there_is(tiny_unet: nn.Module) -> None:
    sites = scan(tiny_unet)
    assert require(sites, "cross & mid", "paint") == [sites[5]]
    with pytest.raises(ValueError, match="paint: the selector 'cross & block'") as caught:
        require(sites, "cross & block", "paint")
    message = str(caught.value)
    assert "the kinds cross, self, the places down, mid, up and the grids /1, /2" in message
    assert select(sites, "cross & block") == []
