"""Tiny denoisers, built from config with seeded random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.attention.denoiser_traits import UNDECLARED, DenoiserTraits
from trainer.backbones.families import find_family

Call = Callable[[nn.Module], Tensor]


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=8,
    ).eval()


def pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    ).eval()


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()


def sana(**changes: Any) -> nn.Module:
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    model: nn.Module = SanaTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=4,
        cross_attention_head_dim=4,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
        patch_size=2,
        **changes,
    ).eval()
    return model


def normed_sana() -> nn.Module:
    """As Sana 1.5: q and k are normed over all heads; not by ones, which would hide a lost norm."""
    model = sana(qk_norm="rms_norm_across_heads")
    for name, parameter in model.named_parameters():
        if "norm_q" in name or "norm_k" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.5)
    return model


FAMILIES = {
    "UNet2DConditionModel": "sd",
    "PixArtTransformer2DModel": "pixart",
    "SanaTransformer2DModel": "sana",
    "DiTTransformer2DModel": "dit",
}


def traits_of(model: nn.Module) -> DenoiserTraits:
    """What the family of a tiny denoiser declares of it."""
    family = FAMILIES.get(type(model).__name__)
    return find_family(family).traits if family else UNDECLARED


def inputs(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x_t": torch.randn(2, 4, 8, 8, generator=generator),
        "text": torch.randn(2, 5, 12, generator=generator),
        "text_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }


def call_unet(model: nn.Module, seed: int = 1) -> Tensor:
    given = inputs(seed)
    output: Any = model(
        given["x_t"],
        torch.tensor([7, 3]),
        encoder_hidden_states=given["text"],
        encoder_attention_mask=given["text_mask"],
    )
    return output.sample


def call_pixart(model: nn.Module, seed: int = 1) -> Tensor:
    given = inputs(seed)
    output: Any = model(
        given["x_t"],
        encoder_hidden_states=given["text"],
        encoder_attention_mask=given["text_mask"],
        timestep=torch.tensor([7, 3]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )
    return output.sample


def call_dit(model: nn.Module, seed: int = 1) -> Tensor:
    output: Any = model(
        inputs(seed)["x_t"],
        timestep=torch.tensor([7, 3]),
        class_labels=torch.tensor([1, 2]),
    )
    return output.sample


def call_sana(model: nn.Module, seed: int = 1) -> Tensor:
    given = inputs(seed)
    output: Any = model(
        given["x_t"],
        encoder_hidden_states=given["text"],
        encoder_attention_mask=given["text_mask"],
        timestep=torch.tensor([7, 3]),
    )
    return output.sample


BACKBONES = {
    "unet": (unet, call_unet),
    "pixart": (pixart, call_pixart),
    "dit": (dit, call_dit),
    "sana": (sana, call_sana),
    "normed_sana": (normed_sana, call_sana),
}


@pytest.fixture(params=sorted(BACKBONES))
def backbone(request: pytest.FixtureRequest) -> tuple[nn.Module, Call]:
    make, call = BACKBONES[request.param]
    return make(), call


@pytest.fixture
def tiny_unet() -> nn.Module:
    return unet()


@pytest.fixture
def run_unet() -> Callable[..., Tensor]:
    return call_unet


@pytest.fixture
def gradients() -> Callable[[nn.Module, Tensor], dict[str, Tensor]]:
    def collect(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        output.square().sum().backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {name: grad.clone() for name, grad in named.items()}

    return collect
